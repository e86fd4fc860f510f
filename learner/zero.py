"""ZeRO: DeepSpeed's stages 1 to 3 around a policy, one optimizer step at a time.

DeepSpeed is imported only here, and only in functions: the controller imports this module too, and DeepSpeed must see
DS_ACCELERATOR, which each rank sets, and logs when it is imported.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
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
        self._config = config
        self._total_steps = total_steps
        self._away: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        fused, decay = device.type == "cuda" or config.offload_optimizer, config.weight_decay
        adam = torch.optim.AdamW(trained, lr=config.lr, betas=config.betas, weight_decay=decay, fused=fused)
        self._deepspeed = _engine(module, config, dtype, adam)

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

    @property
    def steps(self) -> tuple[int, int]:
        """Optimizer steps taken, and those asked for, by which `learning_rate` goes."""
        return int(next(self._partitions())["step"]), self._deepspeed.global_steps

    @steps.setter
    def steps(self, steps: tuple[int, int]) -> None:
        for partition in self._partitions():
            partition["step"].fill_(steps[0])
        self._deepspeed.global_steps = steps[1]

    def slices(self) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
        """What this rank owns: a parameter's name, an element's place in it, and from there on (n,) float32 views of
        its `master`, `exp_avg` and `exp_avg_sq`. After a change of masters: `refresh`."""
        optimizer, partitions = self._deepspeed.optimizer, list(self._partitions())
        for name, parameter in self._deepspeed.module.named_parameters():
            if parameter.requires_grad and hasattr(parameter, "ds_id"):  # ZeRO-3: even parts, the last ones padded
                group, at, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = size * dist.get_rank()
                count = min(size, parameter.ds_numel - start)
            elif link := getattr(parameter, "_hp_mapping", None):
                group, at = link.param_group_index, link.hp_fragment_address.start
                start, count = link.lp_fragment_address.start, link.lp_fragment_address.numel
            else:
                continue
            if count > 0:
                whole = partitions[group].items()
                yield name, start, {part: values[at : at + count] for part, values in whole if part != "step"}

    def refresh(self) -> None:
        """Make the weights anew from their masters. Collective."""
        optimizer = self._deepspeed.optimizer
        if self._deepspeed.zero_optimization_stage() < 3:
            optimizer.update_lp_params()
            return
        optimizer.checkpoint_event_prologue()  # nothing that is gathered stays so
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()

    def _partitions(self) -> Iterator[dict[str, Tensor]]:
        """(n,) `master` and AdamW's state of each of DeepSpeed's groups on this rank."""
        optimizer, adam = self._deepspeed.optimizer, self._deepspeed.optimizer.optimizer
        groups = (group["params"][0] for group in adam.param_groups if group["params"])  # none under ZeRO-3
        for flat in getattr(optimizer, "fp32_partitioned_groups_flat", groups):
            if not (state := adam.state[flat]):  # as torch's AdamW makes it in its first step
                state["step"] = torch.zeros((), device=flat.device)
                state |= {moment: torch.zeros_like(flat.detach()) for moment in ("exp_avg", "exp_avg_sq")}
            yield {"master": flat.detach(), **state}

    def offload(self) -> None:
        """Between steps: keep masters and moments in host memory, and gradients nowhere, until `reload`."""
        # By storage, so that views stay what they are. DeepSpeed's own `offload_states` knows neither stage 1 in bf16
        # nor, under ZeRO-3, torch's AdamW.
        adam, device = self._deepspeed.optimizer.optimizer, self._deepspeed.device
        masters = [*(master for group in adam.param_groups for master in group["params"]), *adam.state]
        moments = [tensor for state in adam.state.values() for tensor in state.values()]
        for tensor in (*masters, *moments):
            storage = tensor.untyped_storage()
            if tensor.device.type == device.type and storage.nbytes():
                host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=device.type == "cuda")
                self._away.append((storage, host.untyped_storage().copy_(storage)))
                storage.resize_(0)
        for gradient in self._gradients():
            gradient.untyped_storage().resize_(0)
        torch.cuda.empty_cache()

    def reload(self) -> None:
        """Bring back what `offload` moved, before the next step, `slices` or `refresh`."""
        for storage, host in self._away:
            storage.resize_(host.nbytes())
            storage.copy_(host)
        self._away.clear()
        for gradient in self._gradients():
            gradient.untyped_storage().resize_(gradient.nbytes)
            gradient.zero_()

    def _gradients(self) -> list[Tensor]:
        """Those on the device that stay allocated between steps: under stage 1 in bf16 and ZeRO-3."""
        optimizer, device = self._deepspeed.optimizer, self._deepspeed.device
        groups = getattr(optimizer, "fp32_groups_gradients_flat", ())
        found = (*groups, getattr(optimizer, "grad_partitions_flat_buffer", None))
        return [one for one in found if one is not None and one.device.type == device.type]


def frozen(module: nn.Module, config: LearnerConfig, dtype: str) -> nn.Module:
    """The module for forward passes without gradient: under ZeRO-3 whole nowhere, but gathered layer by layer."""
    module.requires_grad_(False)
    return _engine(module, config, dtype, None) if config.zero_stage == 3 else module


@contextmanager
def sharded_loading(config: LearnerConfig, dtype: str) -> Iterator[None]:
    """Inside, under ZeRO-3, `from_pretrained` leaves a rank no more than its shards, tensor by tensor. Collective."""
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    _prepare()
    _held = HfDeepSpeedConfig(_settings(config, dtype)) if config.zero_stage == 3 else None  # transformers' is weak
    try:
        yield
    finally:
        unset_hf_deepspeed_config()


@contextmanager
def gathered(parameters: Sequence[nn.Parameter], changed: bool = False) -> Iterator[None]:
    """Inside, the parameters are whole on every rank (ZeRO-3 shards them; otherwise free of charge). Collective.

    `changed`: what is done to them inside, alike on every rank, lasts.
    """
    import deepspeed

    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if changed else None, enabled=bool(sharded)):
        yield


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, sharded or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _prepare() -> Any:
    """DeepSpeed, imported, quiet, and on the default process group."""
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # DeepSpeed's calls
    # DeepSpeed would compile its own shared-memory all-reduce here (a minute, and a compiler); gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    return deepspeed


def _engine(module: nn.Module, config: LearnerConfig, dtype: str, optimizer: torch.optim.Optimizer | None) -> Any:
    settings = _settings(config, dtype)
    # As large as ever what is reduced at once, but no larger than all of it: it is allocated, and where runs are
    # deterministic filled, for every micro-batch.
    zero, own = settings["zero_optimization"], (p for p in module.parameters() if p.requires_grad)
    zero["reduce_bucket_size"] = min(zero["reduce_bucket_size"], sum(math.prod(full_shape(p)) for p in own) or 1)
    engine, *_ = _prepare().initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def _settings(config: LearnerConfig, dtype: str) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero_stage, "overlap_comm": torch.cuda.is_available()}
    zero["reduce_bucket_size"] = 250_000_000 if zero["overlap_comm"] else 500_000_000  # there are two, or one
    if config.offload_optimizer:
        zero["stage"] = max(2, config.zero_stage)  # DeepSpeed's stage 1 would hold the gradients twice
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    # Accumulation is ours (`backward(last)`): a step has as many micro-batches as it needs.
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.grad_clip,
        "bf16": {"enabled": dtype == "bfloat16"},
        # Loading in shards would round what a model computes for itself to the weights' type.
        "data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": ["inv_freq", "e_score_correction_bias"]},
        # Stage 1 reduces once, in place; bf16 would take a copy of all gradients.
        "communication_data_type": "fp32" if zero["stage"] == 1 else None,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW steps on the host without a compiler
        "steps_per_print": 1 << 30,
    }
