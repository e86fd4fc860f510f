"""A step in which too much went wrong stops the run: training on what is left would look like learning."""

from __future__ import annotations

from collections.abc import Sequence

from perception.errors import UserError
from perception.types import INFRASTRUCTURE, ScoredGroup


def check_failures(scored: Sequence[ScoredGroup], limit: float) -> None:
    """Raises UserError, with cause and example, when engine and scorer failures exceed this share of the step."""
    total, failed = 0, []
    for entry in scored:
        for trajectory, score in zip(entry.group.trajectories, entry.scores, strict=True):
            total += 1
            failure = trajectory.failure or score.failure
            if failure is not None and failure.kind in INFRASTRUCTURE:
                failed.append((entry.group.prompt.sample.id, failure))
    if len(failed) > limit * total:
        name, failure = failed[0]
        raise UserError(
            f"{len(failed)} of {total} answers of the step failed, more than reward.max_failure_rate={limit:g} allows; "
            f"the first, sample {name} ({failure.kind}): {failure.detail}"
        )
