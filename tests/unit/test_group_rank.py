"""Guards the soft rank in the group: its limits, its symmetries, who takes part, and what the reward makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perception.config import GroupRankConfig, RewardConfig
from perception.types import Candidate, FailureKind, Group, Trajectory
from reward_workers.combine import rewarded
from reward_workers.group_rank import average_precision, group_ranks, soft_ranks
from tests import builders
from tests.builders import candidate, group, lost, prompt, sample

HARD = GroupRankConfig(temperature=1e-9)
ious = st.integers(0, 100).map(lambda hundredths: hundredths / 100)
groups = st.lists(st.lists(ious, max_size=3), min_size=1, max_size=8)
temperatures = st.sampled_from([1e-300, 1e-3, 0.1, 1.0, 50.0])


def by_hand(values: list[list[float]], temperature: float) -> list[float]:
    """The formula, one pair at a time."""
    everyone = list(chain.from_iterable(values))

    def q(value: float) -> float:
        return sum(1 / (1 + math.exp((other - value) / temperature)) for other in everyone) / len(everyone)

    return [sum(map(q, own)) / len(own) if own else 0.0 for own in values]


def middle_rank(value: float, everyone: list[float]) -> float:
    below, equal = sum(other < value for other in everyone), everyone.count(value)
    return (below + equal / 2) / len(everyone)


# ---------------------------------------------------------------- the formula


def test_two_masks_by_hand() -> None:
    # 0.6 beats 0.4 by two temperatures: sigmoid(2) = 0.8808; itself by 0: 0.5
    assert soft_ranks([[0.4], [0.6]], 0.1) == pytest.approx(((0.5 + 0.119203) / 2, (0.5 + 0.880797) / 2), abs=1e-6)
    # three passes of two samples; the first one's rank is the mean of its two: (1/6 + 5/6) / 2 and 3/6
    assert soft_ranks([[0.1, 0.9], [0.5]], 1e-9) == pytest.approx((0.5, 0.5))


@given(groups, st.sampled_from([0.01, 0.1, 1.0]))
def test_ranks_follow_the_formula(values: list[list[float]], temperature: float) -> None:
    assert soft_ranks(values, temperature) == pytest.approx(by_hand(values, temperature), abs=1e-12)


@given(groups, st.sampled_from([5e-324, 1e-300, 1e-5]))
def test_towards_temperature_zero_they_are_hard_middle_ranks(values: list[list[float]], temperature: float) -> None:
    everyone = list(chain.from_iterable(values))
    expected = [np.mean([middle_rank(value, everyone) for value in own]) if own else 0.0 for own in values]
    assert soft_ranks(values, temperature) == pytest.approx(expected, abs=1e-12)


@given(groups)
def test_a_high_temperature_makes_all_equal(values: list[list[float]]) -> None:
    # |sigmoid(d / T) - 1/2| <= |d| / (4 T)
    ranks = [rank for rank, own in zip(soft_ranks(values, 1000.0), values, strict=True) if own]
    assert ranks == pytest.approx([0.5] * len(ranks), abs=1 / 4000)


@given(st.lists(ious, max_size=40), temperatures)
def test_ranks_of_all_candidates_add_up_to_half_their_number(values: list[float], temperature: float) -> None:
    assert sum(soft_ranks([[value] for value in values], temperature)) == pytest.approx(len(values) / 2, abs=1e-12)


@given(groups, temperatures)
def test_ranks_are_bounded_and_without_warnings(values: list[list[float]], temperature: float) -> None:
    with np.errstate(all="raise", under="ignore"):
        assert all(0 <= rank <= 1 for rank in soft_ranks(values, temperature))


@given(groups, temperatures, st.randoms(use_true_random=False))
def test_the_order_of_samples_only_reorders_the_ranks(values: list[list[float]], temperature: float, random) -> None:
    order = random.sample(range(len(values)), len(values))
    ranks = soft_ranks(values, temperature)
    shuffled = soft_ranks([values[place] for place in order], temperature)
    assert shuffled == pytest.approx([ranks[place] for place in order], abs=1e-12)


@given(groups, temperatures, st.data())
def test_a_better_mask_raises_its_sample_and_no_other(
    values: list[list[float]], temperature: float, data: st.DataObject
) -> None:
    places = [(sample, mask) for sample, own in enumerate(values) for mask in range(len(own))]
    if not places:
        return
    sample, mask = data.draw(st.sampled_from(places))
    better = [list(own) for own in values]
    better[sample][mask] += data.draw(st.floats(0.01, 1))
    before, after = soft_ranks(values, temperature), soft_ranks(better, temperature)
    assert after[sample] >= before[sample] - 1e-12
    assert all(after[other] <= before[other] + 1e-12 for other in range(len(values)) if other != sample)


@given(st.lists(ious, min_size=2, max_size=8), temperatures, st.integers(2, 5))
def test_repeating_an_answer_gains_nothing(values: list[float], temperature: float, passes: int) -> None:
    """Its lead over the mean of the others, which is what an advantage is about, stays what one pass gives."""

    def lead(repeats: int) -> float:
        first, *others = soft_ranks([[values[0]] * repeats, *([value] for value in values[1:])], temperature)
        return first - float(np.mean(others))

    assert lead(passes) == pytest.approx(lead(1), abs=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        soft_ranks([[0.5], [bad]], 0.1)


def test_nothing_to_rank() -> None:
    assert soft_ranks([], 0.1) == ()
    assert soft_ranks([[], []], 0.1) == (0.0, 0.0)


# ---------------------------------------------------------------- who takes part, and by which metric


def measured(*passes: Candidate | float, **metrics: float) -> Trajectory:
    """Without a pass nothing was measured."""
    return builders.measured(*passes, parsed=1.0, **metrics) if passes else lost()


def unparsed(*passes: Candidate, **metrics: float) -> Trajectory:
    return builders.unparsed(*passes, parsed=0.0, **metrics)


def about(*trajectories: Trajectory) -> Group:
    return group(*trajectories, about=prompt(sample("cat 7")))


def rewards(groups: Sequence[Group], config: RewardConfig) -> list[tuple[float | None, ...]]:
    """None: the trajectory was not measured."""
    return [tuple(one.reward for one in each.trajectories) for each in rewarded(groups, config, None)]


def test_average_precision_by_hand() -> None:
    # ten thresholds .50, .55, .. .95; one that is reached exactly counts
    ious = (0.0, 0.49, 0.5, 0.549, 0.55, 0.75, 0.949, 0.95, 1.0)
    assert [average_precision(iou) for iou in ious] == [0, 0, 0.1, 0.1, 0.2, 0.6, 0.9, 1, 1]


@pytest.mark.parametrize(
    ("by", "first"),
    [  # the difference of the two masks 0.6 and 0.4: IoU .2; Dice .75 - 4/7; AP .3 - 0
        ("iou", 0.2),
        ("dice", 0.75 - 4 / 7),
        ("ap", 0.3),
    ],
)
def test_the_metric_is_chosen(by: Literal["iou", "dice", "ap"], first: float) -> None:
    one = about(measured(0.6), measured(0.4))
    expected = (0.5 + 1 / (1 + math.exp(-first / 0.5))) / 2
    ranks = group_ranks(one, GroupRankConfig(by=by, temperature=0.5), failed=False)
    assert ranks == pytest.approx((expected, 1 - expected))


def test_every_pass_of_every_sample_is_compared() -> None:
    one = about(measured(0.2, 0.8), measured(0.5), measured(0.9))
    # hard ranks of .2 .5 .8 .9 are 1/8 3/8 5/8 7/8
    assert group_ranks(one, HARD, failed=False) == pytest.approx((3 / 8, 3 / 8, 7 / 8))


def test_failures_take_no_part() -> None:
    failed = unparsed()
    one = about(measured(0.2), failed, lost(FailureKind.ENGINE), measured(0.5))
    assert group_ranks(one, HARD, failed=False) == pytest.approx((0.25, 0.0, 0.0, 0.75))
    # with them: 0, .2, .5 have the hard ranks 1/6 3/6 5/6; where nothing was measured it stays 0
    assert group_ranks(one, HARD, failed=True) == pytest.approx((3 / 6, 1 / 6, 0.0, 5 / 6))


def test_a_pass_without_an_answer_is_worth_nothing_though_nothing_was_to_be_found() -> None:
    """Where there is no target, the empty mask of a failure equals the empty true mask: IoU 1."""
    failed = unparsed(candidate(1.0, failed=True))
    assert group_ranks(about(failed, measured(0.1)), HARD, failed=True) == pytest.approx((0.25, 0.75))


def test_masks_that_were_not_compared_are_an_error_that_names_the_sample() -> None:
    with pytest.raises(ValueError, match=r"'cat 7'.*mask_iou"):
        group_ranks(about(measured(candidate())), HARD, failed=False)


# ---------------------------------------------------------------- in the reward


def test_the_soft_rank_takes_the_place_of_the_ranked_components() -> None:
    config = RewardConfig(
        name="mine", components={"parsed": 0.5}, ranked={"mask_iou": 2.0, "count_exact": 1.0}, rank="group", group=HARD
    )
    failed = unparsed(mask_iou=0, count_exact=1)
    low, high = (measured(iou, mask_iou=iou, count_exact=1) for iou in (0.2, 0.5))
    one = about(low, failed, high, lost(FailureKind.SCORER))
    [found] = rewards([one], config)
    assert found[:3] == pytest.approx((0.5 + 3 * 0.25, 0.0, 0.5 + 3 * 0.75))
    assert found[3] is None


def test_without_ranked_components_its_weight_is_one() -> None:
    config = RewardConfig(name="mine", components={"parsed": 0.5}, rank="group", group=HARD)
    [found] = rewards([about(measured(0.2), measured(0.5))], config)
    assert found == pytest.approx((0.75, 1.25))


def test_a_failed_sample_has_the_reward_of_failures_or_the_lowest_rank() -> None:
    failed = unparsed()
    one = about(*(measured(0.0) for _ in range(3)), failed)
    fixed = RewardConfig(name="mine", components={"parsed": 0.0}, rank="group", unparsed_reward=-1.0)
    assert rewards([one], fixed) == [(0.5, 0.5, 0.5, -1.0)]
    taking_part = RewardConfig(name="mine", components={"parsed": 0.25}, rank="group", unparsed_reward=None)
    assert rewards([one], taking_part) == [(0.75, 0.75, 0.75, 0.5)]


@given(groups, ious)
def test_rewards_of_a_group_do_not_depend_on_other_groups(values: list[list[float]], other: float) -> None:
    config = RewardConfig(name="mine", components={"parsed": 1.0}, rank="group")
    one = about(*(measured(*own) for own in values))
    alone = rewards([one], config)
    assert rewards([about(measured(other)), one], config)[1:] == alone
