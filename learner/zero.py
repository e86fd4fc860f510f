"""ZeRO: DeepSpeed's stages 1 to 3 around a policy, one optimizer step at a time.

DeepSpeed is imported only here, and only in functions: the controller imports this module too, and DeepSpeed must see
DS_ACCELERATOR, which each rank sets, and logs when it is imported.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from perception.config import LearnerConfig


def learning_rate(config: LearnerConfig, step: int, total_steps: int) -> float:
    """Rate of step 0, 1, ...: linear warm-up over `warmup_steps`, then constant or linear to 0 at `total_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    return config.lr * max(0.0, (total_steps - step) / max(1, total_steps - config.warmup_steps))


class Zero:
    """A policy under DeepSpeed. The default process group must exist; every method is collective."""

    def __init__(self, module: nn.Module, config: LearnerConfig, dtype: str, device: torch.device, total_steps: int):
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # DeepSpeed's calls
        # DeepSpeed would compile its own shared-memory all-reduce here (a minute, and a compiler); gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)
        self._config = config
        self._total_steps = total_steps
        optimizer = torch.optim.AdamW(
            [parameter for parameter in module.parameters() if parameter.requires_grad],
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=device.type == "cuda" or config.offload_optimizer,
        )
        self._deepspeed, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=_settings(config, dtype), dist_init_required=False
        )

    def forward(self, batch: Any) -> Any:
        return self._deepspeed(batch)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the loss's gradient, which DeepSpeed divides by the number of ranks; `last` completes the step's sum."""
        self._deepspeed.set_gradient_accumulation_boundary(last)
        self._deepspeed.backward(loss)

    def step(self) -> tuple[float, float]:
        """Clip, step, zero the gradients. Returns (gradient norm before clipping, learning rate used).

        Where the norm is not finite DeepSpeed drops the gradients and leaves weights and moments as they were.
        """
        lr = learning_rate(self._config, self._deepspeed.global_steps, self._total_steps)
        for parameters in self._deepspeed.optimizer.param_groups:
            parameters["lr"] = lr
        self._deepspeed.step()
        return float(self._deepspeed.get_global_grad_norm()), lr

    def save(self, folder: str, tag: str) -> None:
        self._deepspeed.save_checkpoint(folder, tag=tag, save_latest=False)

    def load(self, folder: str, tag: str) -> None:
        """Restore model and optimizer (same number of ranks, same ZeRO stage). Raises FileNotFoundError."""
        path, _ = self._deepspeed.load_checkpoint(folder, tag=tag)
        if path is None:
            raise FileNotFoundError(f"no learner checkpoint under {folder}/{tag}")

    def flat_parameters(self) -> list[Tensor]:
        """The (n,) buffers that the trained parameters are views of; [] under ZeRO-3, where there are none."""
        return [*getattr(self._deepspeed.optimizer, "bit16_groups_flat", ())]

    def offload(self, weights: bool = False) -> None:
        """Move masters, moments and gradients to host memory until `reload`. Between steps.

        `weights`: the trained weights too, which then have another address after `reload`; not under ZeRO-3.
        """
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State

        moved = [State.lp_grads, State.contiguous_grad_buffer]
        if self._config.zero_stage < 3:
            moved += [State.hp_params, State.optim_states, *[State.lp_params] * weights]
        self._deepspeed.offload_states(include=moved)
        self._move_shards(torch.device("cpu"))

    def reload(self) -> None:
        """Bring back what `offload` moved."""
        self._deepspeed.reload_states()
        self._move_shards(self._deepspeed.device)

    def _move_shards(self, device: torch.device) -> None:
        """ZeRO-3's masters and moments: DeepSpeed moves only those of an Adam that it compiles itself."""
        masters = getattr(self._deepspeed.optimizer, "fp32_partitioned_groups_flat", ())
        for master in () if self._config.offload_optimizer else masters:
            for tensor in (master, *self._deepspeed.optimizer.optimizer.state[master].values()):
                tensor.data = tensor.data.to(device)


@contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, the parameters are whole on every rank (ZeRO-3 shards them; otherwise free of charge). Collective."""
    import deepspeed

    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=None, enabled=bool(sharded)):
        yield


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, sharded or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _settings(config: LearnerConfig, dtype: str) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero_stage, "overlap_comm": False}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    # Accumulation is ours (`backward(last)`): a step has as many micro-batches as it needs.
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.grad_clip,
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW steps on the host without a compiler
        "steps_per_print": 1 << 30,
    }
