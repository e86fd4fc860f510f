"""Advantages: rewards of a group, centred and scaled.

Scaled by the group (GRPO, arXiv 2402.03300), by the batch (Lite PPO, arXiv 2508.08221, and TRL's
`scale_rewards="batch"`) or not at all (Dr. GRPO, arXiv 2503.20783).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from perception.types import Group

Scale = Literal["group", "batch", "none"]
EPSILON = 1e-6
ROUNDING = 1e-9
"""Rewards closer than this are equal: sums of the same components in another order."""


def with_advantages(groups: Sequence[Group], scale: Scale) -> list[Group]:
    """The groups of a whole step with an advantage on every trajectory, 0 where it has no reward."""
    batch = [one.reward for group in groups for one in group.trajectories if one.reward is not None]
    return [_advantaged(group, scale, batch) for group in groups]


def advantages(rewards: Sequence[float], scale: Scale = "group", batch: Sequence[float] = ()) -> np.ndarray:
    """(n,) float64: (r - mean) / (std + 1e-6), or r - mean without scale.

    The std is unbiased (n - 1) and taken over `rewards`, or with scale=batch over `batch`: all rewards of the step.
    Where all rewards are equal, or there are fewer than two, all advantages are 0.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.size < 2 or np.ptp(values) <= ROUNDING:
        return np.zeros_like(values)
    centred = values - values.mean()
    if scale != "none":
        centred /= np.std(values if scale == "group" else batch, ddof=1) + EPSILON
    return centred


def _advantaged(group: Group, scale: Scale, batch: Sequence[float]) -> Group:
    rewards = [one.reward for one in group.trajectories if one.reward is not None]
    values = iter(advantages(rewards, scale, batch).tolist())
    with_value = (replace(one, advantage=0.0 if one.reward is None else next(values)) for one in group.trajectories)
    return replace(group, trajectories=tuple(with_value))
