"""Optimizer steps of a learner rank: groups -> micro-batches -> log-probs, and the gradient of the objective."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from learner.loss import denominator, policy_loss, token_sums
from learner.policy import Policy
from learner.rows import Piece, bins, pieces
from learner.transfer import to_device
from learner.zero import Zero, frozen
from perception.config import Config
from perception.types import Group

Plan = list[list[Piece]]
"""Pieces of every micro-batch of a rank: as many micro-batches on every rank, empty ones where it has less to do."""
Sums = dict[str, Any]
"""Sums over a rank's part of a step: `token_sums` by metric and beside them `COUNTS`. Floats or scalar tensors."""
COUNTS = ("tokens", "sequences", "flops", "rows", "useful", "computed")
"""tokens, sequences: sampled tokens and their trajectories. flops: useful FLOPs. rows: tokens of one row per
trajectory, without padding. useful, computed: tokens of the rows that were made, without padding and with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerStep:
    loss: float
    grad_norm: float
    """Before clipping; not finite where the step was skipped."""
    lr: float


class Stepper:
    """The arithmetic of `LearnerRank`. Every method is collective."""

    def __init__(self, policy: Policy, reference: Policy | None, config: Config) -> None:
        """`policy` is on its device already; from here on it is DeepSpeed's, and so is the `reference`: the policy as
        it started, where a KL asks for one and adapters do not keep it."""
        self._policy, self._device, self._max_new_tokens = policy, policy.model.device, config.rollout.max_new_tokens
        self._config, self._algorithm = config.learner, config.algorithm
        dtype = policy.family.spec.dtype
        self._reference = frozen(reference, config.learner, dtype) if reference is not None else None
        steps = self._algorithm.steps * self._algorithm.updates * self._algorithm.epochs
        self.zero = Zero(policy, config.learner, dtype, self._device, total_steps=steps)
        self._flops = policy.family.flops(policy.model, policy.vision_trained, bool(config.learner.lora.rank))

    def plan(self, groups: Sequence[Group]) -> Plan:
        budget, padded = self._config.micro_tokens, self._policy.padded
        plan: Plan = bins(list(pieces(groups, self._policy.layout, budget, padded)), budget, padded)
        count = torch.tensor(float(len(plan)), device=self._device)
        dist.all_reduce(count, dist.ReduceOp.MAX)
        return plan + [[]] * (max(1, int(count)) - len(plan))

    @torch.no_grad()
    def logprobs(self, plan: Plan, reference: bool = False) -> Iterator[Tensor]:
        """(N,) log-probs of each micro-batch under the current weights, or those of the starting policy."""
        for work in plan:
            batch = to_device(self._policy.collate(work), self._device)
            yield self._reference_logprobs(batch) if reference else self.zero.forward(batch)[0]

    def update(self, batches: Sequence[Sequence[Group]]) -> tuple[list[OptimizerStep], Sums]:
        """`algorithm.epochs` times an optimizer step over each mini-batch, of which these are this rank's groups."""
        plans = [self.plan(groups) for groups in batches]
        old: list[Sequence[Tensor | None]] = [[None] * len(plan) for plan in plans]
        if len(plans) * self._algorithm.epochs > 1 and self._algorithm.importance != "none":
            old = [list(self.logprobs(plan)) for plan in plans]
        sums: Sums = dict.fromkeys(COUNTS, 0.0)
        steps: list[OptimizerStep] = []
        for _ in range(self._algorithm.epochs):
            steps += [self._step(*batch, sums) for batch in zip(plans, old, strict=True)]
        return steps, sums

    def _step(self, plan: Plan, old: Sequence[Tensor | None], sums: Sums) -> OptimizerStep:
        tails = [tail for work in plan for piece in work for tail in piece.tails]
        size = torch.tensor([sum(len(tail.targets) for tail in tails), len(tails)], device=self._device).double()
        dist.all_reduce(size)
        tokens, sequences = size.tolist()
        divisor = denominator(self._algorithm, tokens=tokens, sequences=sequences, max_new_tokens=self._max_new_tokens)
        divisor = max(divisor, 1.0)  # a mini-batch may hold failures only: its step has no gradient
        total = torch.zeros((), device=self._device)
        for number, (work, old_logprobs) in enumerate(zip(plan, old, strict=True)):
            total += self._accumulate(work, old_logprobs, divisor, number == len(plan) - 1, sums)
        dist.all_reduce(total)
        grad_norm, lr = self.zero.step()
        loss = float(total) / divisor
        return OptimizerStep(loss=loss, grad_norm=grad_norm if math.isfinite(loss) else math.nan, lr=lr)

    def _accumulate(self, work: Sequence[Piece], old: Tensor | None, divisor: float, last: bool, sums: Sums) -> Tensor:
        batch = to_device(self._policy.collate(work), self._device)
        tokens = replace(batch.tokens, old_logprobs=old)
        if self._algorithm.kl_coef > 0 and self._algorithm.kl_in == "loss":
            with torch.no_grad():
                tokens = replace(tokens, reference_logprobs=self._reference_logprobs(batch))
        logprobs, entropy = self.zero.forward(batch)
        loss = policy_loss(logprobs, entropy, tokens, self._algorithm)
        # DeepSpeed averages gradients over ranks; the objective sums them.
        self.zero.backward(loss * (dist.get_world_size() / divisor), last=last)
        found = token_sums(logprobs.detach(), entropy.detach(), tokens, self._algorithm)
        for name, value in (found | self._counts(work, batch.computed)).items():
            sums[name] = sums.get(name, 0.0) + value
        return loss.detach()

    def _reference_logprobs(self, batch: object) -> Tensor:
        if self._reference is not None:
            return self._reference(batch)[0]
        self._policy.use_adapters(False)
        logprobs = self.zero.forward(batch)[0]
        self._policy.use_adapters(True)
        return logprobs

    def _counts(self, work: Sequence[Piece], computed: int) -> Sums:
        rows = sum(piece.rows for piece in work)
        return {
            "tokens": sum(len(tail.targets) for piece in work for tail in piece.tails),
            "sequences": sum(len(piece.tails) for piece in work),
            "flops": self._flops(work) if self._flops is not None else 0.0,
            "rows": rows,
            "useful": rows if self._policy.padded else sum(piece.packed for piece in work),
            "computed": computed,
        }
