"""Optimizer steps of a learner rank: groups -> micro-batches -> log-probs, and the gradient of the objective."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from learner.loss import denominator, policy_loss, token_sums
from learner.policy import Policy
from learner.rows import Piece, bins, pieces
from learner.zero import Zero
from perception.config import AlgorithmConfig, LearnerConfig
from perception.types import Group

Plan = list[list[Piece]]
"""Pieces of every micro-batch of a rank: as many micro-batches on every rank, empty ones where it has less to do."""


@dataclass(slots=True)
class Totals:
    """Sums over a rank's part of a step."""

    SUMS: ClassVar = ("tokens", "sequences", "flops", "rows", "useful", "computed")

    tokens: float = 0.0
    sequences: float = 0.0
    flops: float = 0.0
    rows: float = 0.0
    """Tokens of one row per trajectory, without padding."""
    useful: float = 0.0
    """Tokens of the rows that were made, without padding ..."""
    computed: float = 0.0
    """... and with it."""
    statistics: dict[str, Tensor] = field(default_factory=dict)

    def add(self, statistics: dict[str, Tensor]) -> None:
        for name, value in statistics.items():
            self.statistics[name] = self.statistics.get(name, torch.zeros_like(value)) + value


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """One optimizer step."""

    loss: float
    grad_norm: float
    """Before clipping; not finite where the step was skipped."""
    rate: float


def make_reference(policy: Policy, algorithm: AlgorithmConfig, config: LearnerConfig) -> Policy | None:
    """A frozen copy of the starting policy, where the algorithm asks for one: with adapters the base weights serve."""
    if not algorithm.kl_coef or config.lora.rank:
        return None
    return copy.deepcopy(policy).requires_grad_(False)


class Stepper:
    """The arithmetic of `LearnerRank`. Every method is collective unless it says otherwise."""

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        zero: Zero,
        config: LearnerConfig,
        algorithm: AlgorithmConfig,
        max_new_tokens: int,
        device: torch.device,
    ) -> None:
        self._policy, self._reference, self._zero, self._device = policy, reference, zero, device
        self._config, self._algorithm, self._max_new_tokens = config, algorithm, max_new_tokens
        self._flops = policy.family.flops(policy.model, policy.vision_trained, bool(config.lora.rank))

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
            batch = self._policy.collate(work).to(self._device)
            yield self._reference_logprobs(batch) if reference else self._zero.forward(batch)[0]

    def update(self, batches: Sequence[Sequence[Group]]) -> tuple[list[Taken], Totals]:
        """`algorithm.epochs` times an optimizer step over each mini-batch, of which these are this rank's groups."""
        plans = [self.plan(groups) for groups in batches]
        old: list[Sequence[Tensor | None]] = [[None] * len(plan) for plan in plans]
        if len(plans) * self._algorithm.epochs > 1 and self._algorithm.importance != "none":
            old = [list(self.logprobs(plan)) for plan in plans]
        totals, taken = Totals(), []
        for _ in range(self._algorithm.epochs):
            taken += [self._step(*batch, totals) for batch in zip(plans, old, strict=True)]
        return taken, totals

    def _step(self, plan: Plan, old: Sequence[Tensor | None], totals: Totals) -> Taken:
        tails = [tail for work in plan for piece in work for tail in piece.tails]
        mine = [float(sum(len(tail.targets) for tail in tails)), float(len(tails))]
        size = torch.tensor(mine, dtype=torch.float64, device=self._device)
        dist.all_reduce(size)
        tokens, sequences = size.tolist()
        whole = denominator(self._algorithm, tokens=tokens, sequences=sequences, max_new_tokens=self._max_new_tokens)
        whole = max(whole, 1.0)  # a mini-batch may hold failures only: its step has no gradient
        total = torch.zeros((), device=self._device)
        for number, (work, old_logprobs) in enumerate(zip(plan, old, strict=True)):
            total += self._accumulate(work, old_logprobs, whole, number == len(plan) - 1, totals)
        dist.all_reduce(total)
        grad_norm, rate = self._zero.step()
        loss = float(total) / whole
        return Taken(loss=loss, grad_norm=grad_norm if math.isfinite(loss) else math.nan, rate=rate)

    def _accumulate(
        self, work: Sequence[Piece], old: Tensor | None, whole: float, last: bool, totals: Totals
    ) -> Tensor:
        batch = self._policy.collate(work).to(self._device)
        reference = None
        if self._algorithm.kl_coef > 0 and self._algorithm.kl_in == "loss":
            with torch.no_grad():
                reference = self._reference_logprobs(batch)
        logprobs, entropy = self._zero.forward(batch)
        evidence = {"old_logprobs": old, "reference_logprobs": reference}
        loss = policy_loss(logprobs, entropy, batch.tokens, self._algorithm, **evidence)
        # DeepSpeed averages gradients over ranks; the objective sums them.
        self._zero.backward(loss * (dist.get_world_size() / whole), last=last)
        self._count(work, batch.computed, totals)
        totals.add(token_sums(logprobs.detach(), entropy.detach(), batch.tokens, self._algorithm, **evidence))
        return loss.detach()

    def _reference_logprobs(self, batch: object) -> Tensor:
        if self._reference is not None:
            logprobs: Tensor = self._reference(batch)[0]
            return logprobs
        self._policy.use_adapters(False)
        logprobs = self._zero.forward(batch)[0]
        self._policy.use_adapters(True)
        return logprobs

    def _count(self, work: Sequence[Piece], computed: int, totals: Totals) -> None:
        rows = sum(piece.rows for piece in work)
        totals.tokens += sum(len(tail.targets) for piece in work for tail in piece.tails)
        totals.sequences += sum(len(piece.tails) for piece in work)
        totals.rows += rows
        totals.useful += rows if self._policy.padded else sum(piece.packed for piece in work)
        totals.computed += computed
        totals.flops += self._flops(work) if self._flops is not None else 0.0
