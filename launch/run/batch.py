"""What a step learns from: groups sampled in one round, or in several (dynamic sampling: DAPO, arXiv 2503.14476)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from learner.advantages import Advantages, step_advantages
from learner.pool import LearnerPool
from perception import metric_catalog as catalog
from perception.config import AlgorithmConfig
from perception.types import Sample, ScoredGroup, TrainGroup

Rewards = Sequence[Sequence[float]]
"""One tuple per group, one value per trajectory."""


@dataclass(slots=True)
class StepBatch:
    """A step's groups in prompt order, whatever round they are from. All lists but `samples` run parallel."""

    algorithm: AlgorithmConfig
    samples: list[Sample] = field(default_factory=list)
    """Drawn so far; those of the current round come last."""
    scored: list[ScoredGroup] = field(default_factory=list)
    rewards: list[tuple[float, ...]] = field(default_factory=list)
    """What the advantages are made of: less kl_coef * `kl`, where that is given."""
    kl: list[Sequence[float]] = field(default_factory=list)
    """Summed over a trajectory's tokens; empty unless the KL is in the reward."""
    rounds: int = 0

    @property
    def missing(self) -> int:
        """Prompts to sample next: all at first, then (refill) one for every group that teaches nothing."""
        if not self.rounds:
            return self.algorithm.prompts_per_step
        if self.algorithm.dynamic != "refill" or self.rounds >= self.algorithm.dynamic_rounds:
            return 0
        advantages = self.advantages()
        return self.algorithm.prompts_per_step - (len(self.scored) - advantages.zero_variance)

    def add(self, scored: Sequence[ScoredGroup], rewards: Rewards, kl: Rewards) -> None:
        """End a round. `kl` is () or parallel to `rewards`."""
        penalties = kl or [(0.0,) * len(group) for group in rewards]
        self.rewards += [
            tuple(reward - self.algorithm.kl_coef * penalty for reward, penalty in zip(*pair, strict=True))
            for pair in zip(rewards, penalties, strict=True)
        ]
        self.scored += scored
        self.kl += kl
        self.rounds += 1

    def advantages(self) -> Advantages:
        return step_advantages(self.scored, self.rewards, self.algorithm.scale)

    def train_groups(self, advantages: Advantages) -> list[TrainGroup]:
        """What the learner gets; with `dynamic` only groups that teach something.

        Where none does all are kept: every step takes its optimizer step, on which schedule, weight version and
        checkpoints count, and KL and entropy still have a gradient.
        """
        groups = [TrainGroup(group=s.group, advantages=a) for s, a in zip(self.scored, advantages.values, strict=True)]
        teaching = [group for group in groups if any(group.advantages)]
        return teaching if teaching and self.algorithm.dynamic != "none" else groups

    def metrics(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """`groups`: those the learner got."""
        metrics = {
            catalog.SAMPLING_ROUNDS: float(self.rounds),
            catalog.GROUPS_TRAINED: float(len(groups)),
        }
        if self.kl:
            tokens = sum(t.sampled_tokens for entry in self.scored for t in entry.group.trajectories)
            metrics[catalog.KL] = sum(sum(group) for group in self.kl) / tokens
        return metrics


async def reward_kl(learner: LearnerPool, scored: Sequence[ScoredGroup], algorithm: AlgorithmConfig) -> Rewards:
    """KL to the starting policy summed over each trajectory's tokens; () unless it belongs in the reward."""
    if algorithm.kl_in == "loss" or not algorithm.kl_coef:
        return ()
    return await learner.kl([entry.group for entry in scored])
