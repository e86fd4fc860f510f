"""One DeepSpeed rank in a Ray actor. The pool calls the same collective method on every rank, in the same order."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from learner import checkpoint, sync
from learner.batch import MicroBatch, micro_batches
from learner.engine import ZeroEngine, full_shape, gathered
from learner.loss import policy_loss, token_sums
from learner.policy import Policy, make_layout
from perception import names
from perception.config import AlgorithmConfig, LearnerConfig
from perception.types import LearnerReport, PolicySpec, TrainGroup, WeightBucket

FETCH_TIMEOUT_S = 60.0


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
        device: str,
        transport: str,
        threads: int,
        seed: int,
        deterministic: bool,
    ) -> None:
        self._rank, self._world = rank, world
        self._spec, self._config, self._algorithm = policy, config, algorithm
        self._temperature, self._transport = temperature, transport
        self._device = torch.device(device)
        self._clip = {"clip_low": algorithm.clip_low, "clip_high": algorithm.clip_high}
        disable_progress_bar()
        if threads:
            torch.set_num_threads(threads)
        if deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            torch.use_deterministic_algorithms(True)
        torch.manual_seed(seed + rank)

    def open_store(self) -> tuple[str, int]:
        """Rank 0 only: open the rendezvous on a free port of this node; returns (address, port)."""
        address = ray.util.get_node_ip_address()
        self._store = dist.TCPStore(address, 0, self._world, is_master=True, wait_for_workers=False)
        return address, self._store.port

    def start(self, address: str, port: int) -> float:
        """Join the process group and load the policy; returns seconds. Collective."""
        began = time.perf_counter()
        timeout = timedelta(seconds=self._config.timeout_s)
        if self._rank > 0:
            self._store = dist.TCPStore(address, port, self._world, is_master=False, timeout=timeout)
        os.environ |= {"RANK": str(self._rank), "WORLD_SIZE": str(self._world), "LOCAL_RANK": "0"}
        dist.init_process_group(
            "nccl" if self._device.type == "cuda" else "gloo",
            store=self._store,
            rank=self._rank,
            world_size=self._world,
            timeout=timeout,
        )
        self._policy = Policy(self._spec, self._temperature, self._config.gradient_checkpointing).to(self._device)
        self._reference = copy.deepcopy(self._policy).requires_grad_(False) if self._algorithm.kl_coef > 0 else None
        self._layout = make_layout(self._policy, self._spec, _fetch)
        self._engine = ZeroEngine(
            self._policy, self._config, self._spec.dtype, self._device, total_steps=self._algorithm.steps
        )
        self._parameters: dict[str, nn.Parameter] = dict(self._policy.model.named_parameters())
        shapes = {name: (full_shape(p), p.dtype) for name, p in self._parameters.items()}
        self._plans = sync.plan_buckets(shapes, self._config.bucket_mb << 20)
        self._buffers: list[Tensor] = []
        return time.perf_counter() - began

    def train_step(self, groups: Sequence[TrainGroup]) -> LearnerReport:
        """One optimizer step over this rank's share of the step's groups: the same number of groups on every rank.

        The loss is the sum over all sampled tokens of the step, on all ranks, over their number. Collective.
        """
        began = time.perf_counter()
        mine = sum(t.sampled_tokens for entry in groups for t in entry.group.trajectories)
        tokens = self._sum({"tokens": float(mine)})["tokens"]
        sums: dict[str, Tensor] = {}
        left = -(-len(groups) // self._config.micro_groups)
        for _, batch in micro_batches(groups, self._config.micro_groups, self._layout):
            left -= 1
            for name, value in self._accumulate(batch.to(self._device), tokens, last=left == 0).items():
                sums[name] = sums.get(name, torch.zeros((), device=self._device)) + value
        grad_norm, rate = self._engine.step()
        totals = self._sum({name: float(value) for name, value in sums.items()})
        metrics = {name: total / tokens for name, total in totals.items()}
        metrics |= {names.GRAD_NORM: grad_norm, names.LR: rate}
        return LearnerReport(metrics=metrics, seconds=time.perf_counter() - began)

    def _accumulate(self, batch: MicroBatch, tokens: float, last: bool) -> dict[str, Tensor]:
        logprobs, entropy = self._engine.forward(batch)
        reference = None
        if self._reference is not None:
            with torch.no_grad():
                reference, _ = self._reference(batch)
        loss = policy_loss(
            logprobs, batch.tokens, **self._clip, reference_logprobs=reference, kl_coef=self._algorithm.kl_coef
        )
        # DeepSpeed averages gradients over ranks; the objective sums them.
        self._engine.backward(loss * (self._world / tokens), last=last)
        sums = token_sums(logprobs.detach(), entropy, batch.tokens, **self._clip, reference_logprobs=reference)
        return sums | {names.LOSS: loss.detach()}

    @torch.no_grad()
    def logprobs(self, groups: Sequence[TrainGroup]) -> list[list[np.ndarray]]:
        """Per group and trajectory: (sampled tokens,) float32 log-probs under the current weights. Collective."""
        result: list[list[np.ndarray]] = [[] for _ in groups]
        for indices, batch in micro_batches(groups, self._config.micro_groups, self._layout):
            values = self._engine.forward(batch.to(self._device))[0].cpu().numpy()
            lengths = [t.sampled_tokens for i in indices for t in groups[i].group.trajectories]
            pieces = iter(np.split(values, np.cumsum(lengths)))
            for i in indices:
                result[i] = [next(pieces) for _ in groups[i].group.trajectories]
        return result

    def bucket_count(self) -> int:
        return len(self._plans)

    def pack_bucket(self, index: int) -> WeightBucket | None:
        """Bucket `index` of the current weights, on rank 0; None elsewhere. Collective.

        With CUDA IPC a bucket stays valid until the next but one is packed.
        """
        plan = self._plans[index]
        with gathered([self._parameters[slot.name] for slot in plan.slots]):
            if self._rank > 0:
                return None
            packed = sync.pack(plan, self._parameters, self._buffer(index))
        if self._transport == "ipc":
            torch.cuda.synchronize(self._device)
            payload: Any = sync.ipc_handle(packed)
        else:
            payload = ray.put(packed.cpu().numpy())
        return WeightBucket(slots=plan.slots, nbytes=plan.nbytes, transport=self._transport, payload=payload)

    def _buffer(self, index: int) -> Tensor:
        if not self._buffers:
            size = max(plan.nbytes for plan in self._plans)
            self._buffers = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(2)]
        return self._buffers[index % 2]

    def save_checkpoint(self, folder: str, client_state: dict[str, Any]) -> None:
        checkpoint.save(self._engine, Path(folder), client_state)

    def load_checkpoint(self, folder: str) -> dict[str, Any]:
        return checkpoint.load(self._engine, Path(folder))

    def export(self, folder: str) -> None:
        """Write the policy in Hugging Face format. Collective; rank 0 writes."""
        weights: dict[str, Tensor] = {}
        for plan in self._plans:
            with gathered([self._parameters[slot.name] for slot in plan.slots]):
                if self._rank == 0:
                    weights |= {s.name: self._parameters[s.name].detach().to("cpu", copy=True) for s in plan.slots}
        if self._rank == 0:
            checkpoint.export(self._policy, weights, Path(self._spec.path), Path(folder))
        dist.barrier()

    def _sum(self, values: dict[str, float]) -> dict[str, float]:
        """Sums over ranks. Collective; same names everywhere."""
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))


def _fetch(ref: Any) -> bytes:
    return ref if isinstance(ref, bytes) else ray.get(ref, timeout=FETCH_TIMEOUT_S)
