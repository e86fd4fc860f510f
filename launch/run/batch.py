"""Batch of a step: groups taken from the pipeline, ranked, rewarded and given their advantages.

In one round, or (dynamic sampling: DAPO, arXiv 2503.14476) in several, until enough groups teach something.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from launch.run.pipeline import Pipeline
from learner.advantages import with_advantages
from learner.pool import LearnerPool
from perception.config import AlgorithmConfig, Config
from perception.errors import UserError
from perception.types import Group
from reward_workers.combine import rewarded
from reward_workers.ranking import RankStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The groups of a step, and how long they took."""

    groups: list[Group]
    """In prompt order, whatever round they are from; every trajectory has its advantage."""
    teaching: list[Group]
    """The groups that the learner gets."""
    rounds: int
    seconds: dict[str, float]
    """How long the step waited: generate, score, and learn (for the KL in the reward)."""
    began: float
    """When the step began, in seconds of the controller's monotonic clock."""


async def next_batch(
    scored: Pipeline, step: int, config: Config, learner: LearnerPool, ranks: RankStore | None
) -> Batch:
    """Raises UserError when engine and scorer failures exceed `reward.max_failure_rate`."""
    algorithm, began = config.algorithm, time.monotonic()
    seconds = {"generate": 0.0, "score": 0.0, "learn": 0.0}
    groups: list[Group] = []
    rounds, missing = 0, algorithm.prompts_per_step
    while missing:
        asked = time.monotonic()
        taken = await scored.take(missing, step)
        _add_waits(seconds, taken, asked)
        check_failures([*groups, *taken], config.reward.max_failure_rate)
        if algorithm.kl_coef and algorithm.kl_in == "reward":
            asked = time.monotonic()
            taken = await learner.with_kl(taken)
            seconds["learn"] += time.monotonic() - asked
        taken = rewarded(taken, config.reward, ranks, algorithm.kl_coef)
        groups = with_advantages([*groups, *taken], algorithm.scale)
        rounds += 1
        refill = algorithm.dynamic == "refill" and rounds < algorithm.dynamic_rounds
        missing = algorithm.prompts_per_step - sum(group.teaches for group in groups) if refill else 0
    teaching = _teaching(groups, algorithm)
    return Batch(groups=groups, teaching=teaching, rounds=rounds, seconds=seconds, began=began)


def check_failures(groups: Sequence[Group], limit: float) -> None:
    """A step in which too much went wrong stops the run: training on what is left would look like learning.

    Raises UserError, with cause and example, when engine and scorer failures exceed this share of the step.
    """
    every = [(group, one) for group in groups for one in group.trajectories]
    failed = [(group.prompt.sample.id, one.failure) for group, one in every if one.excluded and one.failure]
    if len(failed) > limit * len(every):
        name, failure = failed[0]
        raise UserError(
            f"{len(failed)} of {len(every)} answers of the step failed, more than reward.max_failure_rate={limit:g} "
            f"allows; the first, sample {name} ({failure.kind}): {failure.detail}"
        )


def _teaching(groups: list[Group], algorithm: AlgorithmConfig) -> list[Group]:
    """With `dynamic` only groups that teach something.

    Where none does all are kept: every step takes its optimizer step, on which schedule, weight version and
    checkpoints count, and KL and entropy still have a gradient.
    """
    teaching = [group for group in groups if group.teaches]
    return teaching if teaching and algorithm.dynamic != "none" else groups


def _add_waits(seconds: dict[str, float], groups: Sequence[Group], asked: float) -> None:
    """Scoring overlaps sampling: the wait from `asked` on was for sampling until all groups were sampled, then for
    scoring. What was done before counts nothing."""
    now = time.monotonic()
    sampled = max((group.sampling.ended for group in groups if group.sampling), default=asked)
    sampled = min(max(sampled, asked), now)
    seconds["generate"] += sampled - asked
    seconds["score"] += now - sampled
