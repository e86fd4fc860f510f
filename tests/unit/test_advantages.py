"""Guards group-relative advantages: the published formula, groups that teach nothing, failures that are no evidence."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import advantages, with_advantages
from perception.types import FailureKind, Trajectory
from tests.builders import group, lost, measured, unparsed

REWARDS = st.lists(st.floats(-5, 5), min_size=2, max_size=16)


def test_by_hand() -> None:
    # mean 2, unbiased std sqrt((1 + 0 + 1) / 2) = 1
    assert advantages([1.0, 2.0, 3.0]) == pytest.approx([-1.0, 0.0, 1.0], abs=1e-5)
    assert advantages([0.0, 4.0], "none").tolist() == [-2.0, 2.0]
    assert advantages([0.0, 1.0])[1] == pytest.approx(0.5 / (np.sqrt(0.5) + 1e-6), rel=1e-12)


def test_scaled_by_the_batch_by_hand() -> None:
    # The step's rewards 0, 2, 1, 5 have mean 2 and unbiased std sqrt((4 + 0 + 1 + 9) / 3) = sqrt(14 / 3)
    std, step = math.sqrt(14 / 3) + 1e-6, [0.0, 2.0, 1.0, 5.0]
    first = advantages([0.0, 2.0], "batch", step)
    assert first.tolist() == pytest.approx([-1.0 / std, 1.0 / std], rel=1e-12)
    assert advantages([1.0, 5.0], "batch", step).tolist() == pytest.approx([-2.0 / std, 2.0 / std])
    assert not advantages([3.0, 3.0], "batch", [3.0, 3.0, 0.0, 1.0]).any()


def rewarded(*rewards: float | None) -> list[Trajectory]:
    """None: the reward worker failed."""
    return [lost(FailureKind.SCORER) if one is None else measured(reward=one) for one in rewards]


def test_excluded_trajectories_shift_nothing_and_get_nothing() -> None:
    (done,) = with_advantages([group(*rewarded(1.0, None, 2.0, 3.0))], "group")
    assert [one.advantage for one in done.trajectories] == pytest.approx([-1.0, 0.0, 0.0, 1.0], abs=1e-5)
    (alone,) = with_advantages([group(*rewarded(1.0, None))], "group")
    assert not alone.teaches


def test_rewards_equal_up_to_rounding_teach_nothing() -> None:
    assert not advantages([0.1 + 0.2, 0.3, 0.3]).any()
    assert not advantages([0.7] * 5).any()


@given(REWARDS)
def test_zero_mean_and_order_of_rewards(rewards: list[float]) -> None:
    values = advantages(rewards)
    assert values.sum() == pytest.approx(0.0, abs=1e-6)
    order = np.argsort(rewards, kind="stable")
    assert (np.diff(values[order]) >= 0).all()


@given(REWARDS, st.floats(-3, 3))
def test_an_offset_changes_nothing(rewards: list[float], offset: float) -> None:
    shifted = advantages([r + offset for r in rewards], "none")
    assert shifted == pytest.approx(advantages(rewards, "none"), abs=1e-6)


def test_a_step_counts_what_it_leaves_out() -> None:
    groups = [
        group(measured(reward=1.0), unparsed(reward=0.0), lost(FailureKind.ENGINE)),
        group(*rewarded(2.0, 2.0, 2.0)),
        group(*rewarded(1.0, None, None)),
    ]
    result = with_advantages(groups, "none")
    assert [[one.advantage for one in each.trajectories] for each in result] == [
        [0.5, -0.5, 0.0],
        [0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0],
    ]
    assert [each.teaches for each in result] == [True, False, False]
    assert sum(one.excluded for each in result for one in each.trajectories) == 3
    # Counted in the step: 1, 0, 2, 2, 2, 1: mean 4/3, and the squares of what they are off by, over 6 - 1
    std = math.sqrt((2 * (1 / 3) ** 2 + (4 / 3) ** 2 + 3 * (2 / 3) ** 2) / 5) + 1e-6
    batch = with_advantages(groups, "batch")
    assert [one.advantage for one in batch[0].trajectories] == pytest.approx([0.5 / std, -0.5 / std, 0.0])
    assert [each.teaches for each in batch] == [True, False, False]
