"""Guards group-relative advantages: the published formula, groups that teach nothing, failures that are no evidence."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import group_advantages, step_advantages
from perception.types import Answer, Failure, FailureKind, Group, PolicySpec, Score, ScoredGroup, Trajectory
from tests.train_groups import train_group

REWARDS = st.lists(st.floats(-5, 5), min_size=2, max_size=16)


def test_by_hand() -> None:
    # mean 2, unbiased std sqrt((1 + 0 + 1) / 2) = 1
    assert group_advantages([1.0, 2.0, 3.0], [True] * 3) == pytest.approx([-1.0, 0.0, 1.0], abs=1e-5)
    assert group_advantages([0.0, 4.0], [True] * 2, "none").tolist() == [-2.0, 2.0]
    assert group_advantages([0.0, 1.0], [True] * 2)[1] == pytest.approx(0.5 / (np.sqrt(0.5) + 1e-6), rel=1e-12)


def test_scaled_by_the_batch_by_hand() -> None:
    # The step's counted rewards 0, 2, 1, 5 have mean 2 and unbiased std sqrt((4 + 0 + 1 + 9) / 3) = sqrt(14 / 3)
    std, step = math.sqrt(14 / 3) + 1e-6, [0.0, 2.0, 1.0, 5.0]
    first = group_advantages([0.0, 2.0, 99.0], [True, True, False], "batch", step)
    assert first.tolist() == pytest.approx([-1.0 / std, 1.0 / std, 0.0], rel=1e-12)
    assert group_advantages([1.0, 5.0], [True] * 2, "batch", step).tolist() == pytest.approx([-2.0 / std, 2.0 / std])
    assert not group_advantages([3.0, 3.0], [True] * 2, "batch", [3.0, 3.0, 0.0, 1.0]).any()


def test_excluded_trajectories_shift_nothing_and_get_nothing() -> None:
    assert group_advantages([1.0, 99.0, 2.0, 3.0], [True, False, True, True]) == pytest.approx(
        [-1.0, 0.0, 0.0, 1.0], abs=1e-5
    )
    assert not group_advantages([1.0, 5.0], [True, False]).any()


def test_rewards_equal_up_to_rounding_teach_nothing() -> None:
    assert not group_advantages([0.1 + 0.2, 0.3, 0.3], [True] * 3).any()
    assert not group_advantages([0.7] * 5, [True] * 5).any()


@given(REWARDS)
def test_zero_mean_and_order_of_rewards(rewards: list[float]) -> None:
    values = group_advantages(rewards, [True] * len(rewards))
    assert values.sum() == pytest.approx(0.0, abs=1e-6)
    order = np.argsort(rewards, kind="stable")
    assert (np.diff(values[order]) >= 0).all()


@given(REWARDS, st.floats(-3, 3))
def test_an_offset_changes_nothing(rewards: list[float], offset: float) -> None:
    counted = [True] * len(rewards)
    shifted = group_advantages([r + offset for r in rewards], counted, "none")
    assert shifted == pytest.approx(group_advantages(rewards, counted, "none"), abs=1e-6)


def test_a_step_counts_what_it_leaves_out() -> None:
    rng = np.random.default_rng(0)
    spec = PolicySpec(path="", dtype="float32", image_token_id=300, eos_token_ids=(1,), banned_token_ids=())
    base = train_group(spec, rng, n=3).group
    engine = Failure(kind=FailureKind.ENGINE, detail="died")
    lost = Trajectory(index=2, turns=base.trajectories[2].turns, failure=engine)

    def scored(group: Group, *failures: Failure | None) -> ScoredGroup:
        scores = tuple(Score(metrics={}, answer=Answer(objects=()), failure=f) for f in failures)
        return ScoredGroup(group=group, scores=scores, seconds=0.0, cached=False)

    unparsed = Failure(kind=FailureKind.UNPARSED, detail="no answer")
    scorer = Failure(kind=FailureKind.SCORER, detail="timed out")
    groups = [
        scored(Group(prompt=base.prompt, trajectories=(*base.trajectories[:2], lost)), None, unparsed, None),
        scored(base, None, None, None),
        scored(base, None, scorer, scorer),
    ]
    rewards = [(1.0, 0.0, 50.0), (2.0, 2.0, 2.0), (1.0, 2.0, 3.0)]
    result = step_advantages(groups, rewards, "none")
    assert result.values == ((0.5, -0.5, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    assert result.zero_variance == 2
    assert result.excluded == 3
    # Counted in the step: 1, 0, 2, 2, 2, 1: mean 4/3, and the squares of what they are off by, over 6 - 1
    std = math.sqrt((2 * (1 / 3) ** 2 + (4 / 3) ** 2 + 3 * (2 / 3) ** 2) / 5) + 1e-6
    batch = step_advantages(groups, rewards, "batch")
    assert batch.values == (pytest.approx((0.5 / std, -0.5 / std, 0.0)), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    assert batch.zero_variance == 2
