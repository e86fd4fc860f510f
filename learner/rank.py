"""One DeepSpeed rank in a Ray actor. The pool calls the same collective method on every rank, in the same order."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from transformers.utils.logging import disable_progress_bar

from learner import checkpoint
from learner.flops import MatrixRate
from learner.loss import kl
from learner.policy import load_policy
from learner.step import Plan, Stepper, Totals, make_reference
from learner.weights import WeightSender, weights
from learner.zero import ZeroEngine
from perception import metric_catalog as catalog
from perception.config import AlgorithmConfig, LearnerConfig
from perception.types import LearnerReport, PolicySpec, TrainGroup
from runtime.objects import fetch
from runtime.weights import join_store, open_store


class LearnerRank:
    """Rank `rank` of `world`. Made a Ray actor by the pool; `start` before anything else."""

    def __init__(
        self,
        rank: int,
        world: int,
        *,
        policy: PolicySpec,
        config: LearnerConfig,
        algorithm: AlgorithmConfig,
        temperature: float,
        max_new_tokens: int,
        device: str,
        transport: str,
        threads: int,
        seed: int,
        deterministic: bool,
    ) -> None:
        self._rank, self._world = rank, world
        self._spec, self._config, self._algorithm = policy, config, algorithm
        self._temperature, self._transport, self._max_new_tokens = temperature, transport, max_new_tokens
        self._device = torch.device(device)
        disable_progress_bar()
        if threads:
            torch.set_num_threads(threads)
        if deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            torch.use_deterministic_algorithms(True)
        torch.manual_seed(seed + rank)

    def open_store(self) -> tuple[str, int]:
        """Rank 0 only: open the rendezvous on a free port of this node; returns (address, port)."""
        self._store = open_store(ray.util.get_node_ip_address(), self._world, self._config.timeout_s)
        return self._store.host, self._store.port

    def start(self, address: str, port: int) -> float:
        """Join the process group and load the policy; returns seconds. Collective."""
        began = time.perf_counter()
        if self._rank > 0:
            self._store = join_store(address, port, self._world, self._config.timeout_s)
        os.environ |= {"RANK": str(self._rank), "WORLD_SIZE": str(self._world), "LOCAL_RANK": "0"}
        dist.init_process_group(
            "nccl" if self._device.type == "cuda" else "gloo",
            store=self._store,
            rank=self._rank,
            world_size=self._world,
            timeout=timedelta(seconds=self._config.timeout_s),
        )
        self._policy = load_policy(
            self._spec, self._temperature, self._config, fetch, self._algorithm.entropy_coef > 0
        ).to(self._device)
        reference = make_reference(self._policy, self._algorithm, self._config)
        updates = self._algorithm.steps * self._algorithm.updates * self._algorithm.epochs
        self._engine = ZeroEngine(self._policy, self._config, self._spec.dtype, self._device, total_steps=updates)
        self._stepper = Stepper(
            self._policy, reference, self._engine, self._config, self._algorithm, self._max_new_tokens, self._device
        )
        self._rate = MatrixRate(self._device, getattr(torch, self._spec.dtype))
        self._sender = WeightSender(
            weights(self._policy.model), self._config, rank=self._rank, device=self._device, transport=self._transport
        )
        return time.perf_counter() - began

    def train_step(self, batches: Sequence[Sequence[TrainGroup]]) -> LearnerReport:
        """`algorithm.epochs` times an optimizer step over each mini-batch, of which these are this rank's groups.

        Collective.
        """
        began = time.perf_counter()
        plans = [self._stepper.plan(groups) for groups in batches]
        old: list[Sequence[Tensor | None]] = [[None] * len(plan) for plan in plans]
        updates = len(plans) * self._algorithm.epochs
        if updates > 1 and self._algorithm.importance != "none":
            old = [list(self._stepper.logprobs(plan)) for plan in plans]
        totals, steps = Totals(), []
        for _ in range(self._algorithm.epochs):
            steps += [self._stepper.update(*batch, totals) for batch in zip(plans, old, strict=True)]
        losses, norms, rates = (np.asarray(values) for values in zip(*steps, strict=True))
        metrics = self._metrics(totals, time.perf_counter() - began)
        metrics |= {
            catalog.LOSS: losses.mean(),
            catalog.GRAD_NORM: norms.mean(),
            catalog.LR: rates[-1],
        }
        return LearnerReport(
            metrics={name: float(value) for name, value in metrics.items()}, seconds=time.perf_counter() - began
        )

    def _metrics(self, totals: Totals, seconds: float) -> dict[str, float]:
        counts = {name: float(getattr(totals, name)) for name in Totals.SUMS}
        counts |= {"images": float(self._policy.images), "known": float(self._policy.images_known)}
        self._policy.images = self._policy.images_known = 0
        statistics = {name: float(value) for name, value in totals.statistics.items()}
        whole = self._reduce(counts | statistics)
        memory = self._reduce({"peak": _peak_bytes(self._device)}, dist.ReduceOp.MAX)["peak"]
        metrics = {name: whole[name] / whole["tokens"] for name in statistics} | {
            catalog.LEARNER_SAMPLES_PER_S: whole["sequences"] / seconds,
            catalog.LEARNER_TOKENS_PER_S: whole["useful"] / seconds,
            catalog.PACKING: whole["rows"] / whole["computed"],
            catalog.ROW_FILL: whole["useful"] / whole["computed"],
            catalog.PEAK_MEMORY: memory / 2**30,
            catalog.COMPILED: float(counters["stats"]["unique_graphs"]),
        }
        if whole["flops"]:
            metrics[catalog.MFU] = whole["flops"] / seconds / (self._rate.measure() * self._world)
        if whole["images"]:
            metrics[catalog.FEATURE_HITS] = whole["known"] / whole["images"]
        return metrics

    def logprobs(self, groups: Sequence[TrainGroup]) -> list[list[np.ndarray]]:
        """Per group and trajectory: (sampled tokens,) float32 log-probs under the current weights. Collective."""
        plan = self._stepper.plan(groups)
        return _by_trajectory(groups, plan, self._stepper.logprobs(plan))

    def kl(self, groups: Sequence[TrainGroup]) -> list[tuple[float, ...]]:
        """Per group and trajectory: `algorithm.kl` to the starting policy, summed over tokens. Collective."""
        plan = self._stepper.plan(groups)
        current = list(self._stepper.logprobs(plan))
        pairs = zip(current, self._stepper.logprobs(plan, reference=True), strict=True)
        values = (kl(now.double(), start.double(), self._algorithm.kl) for now, start in pairs)
        return [tuple(float(one.sum()) for one in group) for group in _by_trajectory(groups, plan, values)]

    def sender(self, method: str, *arguments: Any) -> Any:
        """Call a method of the rank's `WeightSender`."""
        return getattr(self._sender, method)(*arguments)

    def save_checkpoint(self, folder: str, client_state: dict[str, Any]) -> None:
        checkpoint.save(self._engine, Path(folder), client_state)

    def load_checkpoint(self, folder: str) -> dict[str, Any]:
        return checkpoint.load(self._engine, Path(folder))

    def export(self, folder: str) -> None:
        """Write the policy in Hugging Face format, adapters merged. Collective; rank 0 writes."""
        whole = self._sender.whole()
        if self._rank == 0:
            checkpoint.export(self._policy, whole, Path(self._spec.path), Path(folder))
        dist.barrier()

    def _reduce(self, values: dict[str, float], operation: Any = dist.ReduceOp.SUM) -> dict[str, float]:
        """Over ranks. Collective; same names everywhere."""
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self._device)
        dist.all_reduce(total, operation)
        return dict(zip(values, total.tolist(), strict=True))


def _by_trajectory(groups: Sequence[TrainGroup], plan: Plan, values: Iterable[Tensor]) -> list[list[np.ndarray]]:
    """(N,) values of each micro-batch -> per group and trajectory (sampled tokens,)."""
    result = [[np.zeros(0, np.float32) for _ in entry.group.trajectories] for entry in groups]
    for work, of_work in zip(plan, values, strict=True):
        tails = [tail for piece in work for tail in piece.tails]
        ends = np.cumsum([len(tail.targets) for tail in tails])
        for tail, part in zip(tails, np.split(of_work.cpu().numpy(), ends[:-1] if tails else []), strict=False):
            result[tail.group][tail.trajectory] = part
    return result


def _peak_bytes(device: torch.device) -> float:
    """Most memory so far: of the device, or of the process on the CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
