"""Learner rank: a DeepSpeed rank as a Ray actor. The pool calls collective methods on every rank, in the same order."""

import os
import resource
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from transformers.utils.logging import disable_progress_bar

from learner import checkpoint
from learner.export import export, try_export
from learner.flops import MatrixRate
from learner.loss import kl
from learner.policy import Policy, load_policy
from learner.step import COUNTS, Plan, Stepper, Sums
from learner.weights import WeightSender, weights
from learner.zero import gathered, sharded_loading
from perception import metric_catalog as catalog
from perception.config import Config
from perception.types import Group, LearnerReport, PolicySpec
from runtime.actors import Call
from runtime.objects import fetch
from runtime.tracing import Traced
from runtime.weights import join_store, open_store

R = TypeVar("R")


class LearnerRank(Traced):
    """Rank `rank` of `world`; `start` before anything else, on all ranks."""

    def __init__(self, rank: int, world: int, policy: PolicySpec, config: Config) -> None:
        self._rank, self._world, self._spec, self._config = rank, world, policy, config
        placement = config.placement
        self._device = torch.device(placement.device)
        self._share = 1.0 if placement.sleep else placement.learner_gpus  # in its turn it has the GPU to itself
        os.environ |= {"DS_ACCELERATOR": placement.device, "TOKENIZERS_PARALLELISM": "false"}
        if placement.threads:
            torch.set_num_threads(placement.threads)
        if config.run.deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            torch.use_deterministic_algorithms(True)
        torch.manual_seed(config.run.seed + rank)

    def open_store(self) -> tuple[str, int]:
        """Rank 0 only: open the rendezvous on a free port of this node; returns (address, port)."""
        self._store = open_store(ray.util.get_node_ip_address(), self._world, self._config.learner.timeout_s)
        return self._store.host, self._store.port

    def start(self, address: str, port: int) -> float:
        """Join the process group and load the policy; returns seconds. Collective."""
        began = time.perf_counter()
        disable_progress_bar()
        if self._shares_gpu:
            torch.cuda.set_per_process_memory_fraction(self._share)
        self._join(address, port)
        config = self._config
        self._policy = self._load()
        if self._rank == 0:
            try_export(self._policy)
        reference = self._load() if config.algorithm.kl_coef > 0 and not config.learner.lora.rank else None
        self._stepper = Stepper(self._policy, reference, config)
        self._matrix_rate = MatrixRate(self._device, getattr(torch, self._spec.dtype))
        own, transport = weights(self._policy.model), config.placement.transport
        self._sender = WeightSender(own, config.learner, rank=self._rank, device=self._device, transport=transport)
        return time.perf_counter() - began

    def _load(self) -> Policy:
        """The policy as the run starts from it, on the device. Collective."""
        config, temperature = self._config.learner, self._config.rollout.temperature
        with sharded_loading(config, self._spec.dtype):
            entropy_gradient = self._config.algorithm.entropy_coef > 0
            return load_policy(self._spec, temperature, config, fetch, entropy_gradient).to(self._device)

    def _join(self, address: str, port: int) -> None:
        limit_s = self._config.learner.timeout_s
        if self._rank > 0:
            self._store = join_store(address, port, self._world, limit_s)
        os.environ |= {"RANK": str(self._rank), "WORLD_SIZE": str(self._world), "LOCAL_RANK": "0"}
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        limit = timedelta(seconds=limit_s)
        dist.init_process_group(backend, store=self._store, rank=self._rank, world_size=self._world, timeout=limit)

    def update(self, batches: Sequence[Sequence[Group]]) -> LearnerReport:
        """`algorithm.epochs` times an optimizer step over each mini-batch, of which these are this rank's groups.

        Collective.
        """
        began = time.perf_counter()
        steps, sums = self._stepper.update(batches)
        if self._shares_gpu:
            torch.cuda.empty_cache()
        finite = [step for step in steps if np.isfinite(step.grad_norm)]
        metrics = self._metrics(sums, time.perf_counter() - began) | {
            catalog.LOSS: float(np.mean([step.loss for step in finite or steps])),
            catalog.GRAD_NORM: float(np.mean([step.grad_norm for step in finite or steps])),
            catalog.LR: steps[-1].lr,
            catalog.SKIPPED: float(len(steps) - len(finite)),
            catalog.OPTIMIZER_STEPS: float(len(finite)),
        }
        return LearnerReport(metrics=metrics, seconds=time.perf_counter() - began)

    @property
    def _shares_gpu(self) -> bool:
        """Its memory there is limited to its share, and what a step no longer needs is given back."""
        return self._device.type == "cuda" and self._share < 1

    def _metrics(self, sums: Sums, seconds: float) -> dict[str, float]:
        images = {"images": self._policy.images, "known": self._policy.images_known}
        self._policy.images = self._policy.images_known = 0
        totals = self._reduce(sums | images)
        memory = self._reduce({"peak": _peak_bytes(self._device)}, dist.ReduceOp.MAX)["peak"]
        metrics = {name: totals[name] / max(totals["tokens"], 1.0) for name in sums if name not in COUNTS} | {
            catalog.LEARNER_SAMPLES_PER_S: totals["sequences"] / seconds,
            catalog.LEARNER_TOKENS_PER_S: totals["useful"] / seconds,
            catalog.PACKING: totals["rows"] / totals["computed"],
            catalog.ROW_FILL: totals["useful"] / totals["computed"],
            catalog.PEAK_MEMORY: memory / 2**30,
            catalog.COMPILED: float(counters["stats"]["unique_graphs"]),
        }
        if totals["flops"]:
            metrics[catalog.MFU] = totals["flops"] / seconds / (self._matrix_rate.measure() * self._world)
        if totals["images"]:
            metrics[catalog.FEATURE_HITS] = totals["known"] / totals["images"]
        return metrics

    def logprobs(self, groups: Sequence[Group]) -> list[list[np.ndarray]]:
        """Per group and trajectory: (sampled tokens,) float32 log-probs under the current weights, (0,) where it takes
        no part. Collective."""
        plan = self._stepper.plan(groups)
        return _by_trajectory(groups, plan, self._stepper.logprobs(plan))

    def kl(self, groups: Sequence[Group]) -> list[tuple[float, ...]]:
        """Per group and trajectory: `algorithm.kl` to the starting policy, summed over tokens. Collective."""
        plan = self._stepper.plan(groups)
        current = list(self._stepper.logprobs(plan))
        pairs = zip(current, self._stepper.logprobs(plan, reference=True), strict=True)
        values = (kl(now.double(), start.double(), self._config.algorithm.kl) for now, start in pairs)
        return [tuple(float(one.sum()) for one in group) for group in _by_trajectory(groups, plan, values)]

    def send(self, wanted: Call[WeightSender, R]) -> R:
        """Call this rank's weight sender; collective where its method is."""
        return getattr(self._sender, wanted.method)(*wanted.arguments, **wanted.named)

    def perturb(self, back: bool) -> None:
        """Multiply trained weights by seeded factors of 0.9 to 1.1, or divide by them. Collective."""
        noise = torch.Generator().manual_seed(0)  # the same on every rank
        for parameter in (weight.base for weight in weights(self._policy.model).values() if weight.trained):
            with gathered([parameter], changed=True):
                change = torch.empty(parameter.shape).uniform_(-0.1, 0.1, generator=noise)
                parameter.data.mul_((-change if back else change).exp().to(parameter))

    def save(self, folder: str) -> dict[str, str]:
        """Write this rank's part of a checkpoint (`checkpoint.save`)."""
        return checkpoint.save(self._stepper.zero, Path(folder))

    def load(self, folder: str, weights_only: bool = False) -> None:
        """Restore what `save` wrote (`checkpoint.load`). Collective."""
        checkpoint.load(self._stepper.zero, Path(folder), weights_only)

    def offload(self) -> None:
        """Move what is not needed between steps to host memory (`Zero.offload`). Collective."""
        self._stepper.zero.offload()

    def reload(self) -> None:
        """Bring it back before the next step, checkpoint or export. Collective."""
        self._stepper.zero.reload()

    def export(self, folder: str) -> None:
        """Write the policy in Hugging Face format, adapters merged and by themselves. Collective; rank 0 writes."""
        whole, adapters = self._sender.whole(), self._sender.adapters()
        if self._rank == 0:
            export(self._policy, whole, Path(folder), self._config.learner.lora, adapters)
        dist.barrier()

    def _reduce(self, values: Sums, operation: Any = dist.ReduceOp.SUM) -> dict[str, float]:
        """The values summed, or else, over the ranks. Collective; same names everywhere."""
        total = torch.tensor([float(value) for value in values.values()], dtype=torch.float64, device=self._device)
        dist.all_reduce(total, operation)
        return dict(zip(values, total.tolist(), strict=True))


def _by_trajectory(groups: Sequence[Group], plan: Plan, values: Iterable[Tensor]) -> list[list[np.ndarray]]:
    """(N,) values of each micro-batch -> per group and trajectory (sampled tokens,)."""
    result = [[np.zeros(0, np.float32) for _ in group.trajectories] for group in groups]
    for work, found in zip(plan, values, strict=True):
        tails = [tail for piece in work for tail in piece.tails]
        lengths = [len(tail.targets) for tail in tails]
        for tail, part in zip(tails, found[: sum(lengths)].cpu().split(lengths), strict=True):
            result[tail.group][tail.trajectory] = part.numpy()
    return result


def _peak_bytes(device: torch.device) -> float:
    """Most memory so far: of the device, or of the process on the CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
