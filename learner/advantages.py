"""Rewards of a group -> advantages.

Scaled by the group (GRPO, arXiv 2402.03300), by the batch (Lite PPO, arXiv 2508.08221, and TRL's
`scale_rewards="batch"`) or not at all (Dr. GRPO, arXiv 2503.20783).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Literal

import numpy as np

from perception.types import INFRASTRUCTURE, Failure, ScoredGroup

Scale = Literal["group", "batch", "none"]
EPSILON = 1e-6
ROUNDING = 1e-9
"""Rewards closer than this are equal: sums of the same components in another order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    values: tuple[tuple[float, ...], ...]
    """One tuple per group, one advantage per trajectory."""
    zero_variance: int
    """Groups whose counted rewards are all equal: they teach nothing."""
    excluded: int
    """Trajectories left out because the infrastructure failed."""


def step_advantages(scored: Sequence[ScoredGroup], rewards: Sequence[Sequence[float]], scale: Scale) -> Advantages:
    """Advantages of a whole step; `rewards` runs parallel to `scored`: one per group and trajectory."""
    counted = [
        [not _excluded(t.failure, s.failure) for t, s in zip(entry.group.trajectories, entry.scores, strict=True)]
        for entry in scored
    ]
    batch = [r for group, c in zip(rewards, counted, strict=True) for r in compress(group, c)]
    values = [group_advantages(r, c, scale, batch) for r, c in zip(rewards, counted, strict=True)]
    return Advantages(
        values=tuple(tuple(v.tolist()) for v in values),
        zero_variance=sum(not v.any() for v in values),
        excluded=sum(c.count(False) for c in counted),
    )


def group_advantages(
    rewards: Sequence[float], counted: Sequence[bool], scale: Scale = "group", batch: Sequence[float] = ()
) -> np.ndarray:
    """(n,) float64: (r - mean) / (std + 1e-6), or r - mean without scale.

    Mean and unbiased std (n - 1) are taken over the counted trajectories, the std with scale=batch over `batch`: all
    counted rewards of the step. The others get 0. Where all counted rewards are equal, or fewer than two are counted,
    all get 0.
    """
    values = np.asarray(rewards, dtype=np.float64)
    mask = np.asarray(counted, dtype=bool)
    advantages = np.zeros_like(values)
    kept = values[mask]
    if kept.size < 2 or np.ptp(kept) <= ROUNDING:
        return advantages
    centred = kept - kept.mean()
    if scale != "none":
        centred /= np.std(kept if scale == "group" else batch, ddof=1) + EPSILON
    advantages[mask] = centred
    return advantages


def _excluded(*failures: Failure | None) -> bool:
    return any(failure is not None and failure.kind in INFRASTRUCTURE for failure in failures)
