"""Guards the reward components (values worked out by hand), the presets, and the rule that combines them."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from launch.run.config import CONF, compose
from perception.config import EcdfConfig, RewardConfig
from perception.errors import UserError
from perception.frames import Frame, convert_answer
from perception.tasks import TASKS
from perception.types import FailureKind, Group, Target, Trajectory
from reward_workers.combine import make_store, rewarded
from reward_workers.components import COMPONENTS, Case, reward_terms
from tests import builders
from tests.builders import lost, measured, target, unparsed

SIDE = 840
TRUTH = target([(100, 100, 199, 199), (400, 400, 499, 499)], [(150, 150), (450, 450)])
NOTHING = target()
PUBLISHED = ("dr_seg_iou", "dr_seg_count", "dr_seg_points")
OURS = ("matched_iou", "count_ratio", "point_score")
RIGHT = '{"bbox_2d": [100, 100, 199, 199], "point_2d": [150, 150]}'
OFF = '{"bbox_2d": [400, 400, 499, 449], "point_2d": [450, 565]}'  # upper half; the point 115 px below and outside


def said(items: str, think: str = "I see <look>two squares</look> here") -> str:
    return f"<think>{think}</think><answer>{items}</answer>"


def case(text: str, truth: Target = TRUTH, **changes: float) -> Case:
    return builders.case(text, truth, SIDE, **changes)


def values(one: Case, *names: str) -> list[float]:
    return [COMPONENTS[name].measure(one) for name in names]


@pytest.mark.parametrize(("names", "half"), [(PUBLISHED, 0.5), (OURS, 49 / 99)])
def test_matched_metrics_by_hand(names: tuple[str, ...], half: float) -> None:
    # published: boxes are 100x50 of 100x100 pixels; ours: 99x49 of 99x99
    iou, count, point = values(case(said(f"[{OFF}, {RIGHT}]")), *names)
    assert iou == pytest.approx((1 + half) / 2)
    assert count == 1
    assert point == pytest.approx((1 + (200 - 115) / 170) / 2)


def test_accuracy_by_hand() -> None:
    # the right one hits all three; the other: IoU .5 is not above .5, L1 = 50/4 = 12.5 px, point outside
    assert values(case(said(f"[{RIGHT}, {OFF}]")), "vision_reasoner_accuracy") == [1.5]
    assert values(case(said(f"[{RIGHT}]")), "vision_reasoner_accuracy") == [1.5]
    assert values(case("gibberish"), "vision_reasoner_accuracy") == [0]


def test_values_computed_with_the_released_code() -> None:
    """Three answers and two objects; the pairs are (1, 0) and (0, 1), with IoU .867538 and .858407 and distances of 60
    and 14.1 px: of the six hits the first pair's point misses, so 5 over 3 objects."""
    found = [((100, 100, 200, 200), (150, 150)), ((400, 400, 500, 520), (450, 400)), ((10, 10, 20, 20), (15, 15))]
    items = ", ".join(f'{{"bbox_2d": {list(box)}, "point_2d": {list(point)}}}' for box, point in found)
    truth = target([(402, 404, 505, 515), (104, 96, 204, 204)], [(450, 460), (160, 160)])
    assert values(case(said(f"[{items}]"), truth), "vision_reasoner_accuracy", *PUBLISHED) == pytest.approx(
        [1.666667, 0.862972, 0.666667, 0.911765], abs=1e-6
    )


def test_thresholds_hold_in_the_840_frame_whatever_the_image() -> None:
    """The same picture at a quarter of the size, answered in yet another frame."""
    small = target(TRUTH.boxes / 4, TRUTH.points / 4)
    text = said('[{"bbox_2d": [50, 50, 99.5, 99.5], "point_2d": [75, 75]}]')
    image, written = Frame(210, 210), Frame(420, 420)
    view = builders.view(0, 0, 210, 210, 420, 420)
    answer = convert_answer(TASKS["segment"].parse(text), written, image)
    one = builders.case(text, small, answer=answer, image=image, view=view)
    assert values(one, *PUBLISHED, "vision_reasoner_accuracy") == [1, 0.5, 1, 1.5]


def test_text_components() -> None:
    good = case(said(f"[{RIGHT}]"))
    assert values(good, "think_format", "answer_format", "look", "non_repeat", "parsed") == [1, 2, 1, 1, 1]
    bad = case("I see it. I see it. I see it.")
    assert values(bad, "think_format", "answer_format", "look", "non_repeat", "parsed") == [0, 0, 0, 0, 0]
    assert values(bad, "non_repeat_plain") == [0]
    assert values(case("Yes! Yes! Yes!"), "non_repeat", "non_repeat_plain") == [0, 1]


def test_counts_and_areas_by_hand() -> None:
    both, one = case(said(f"[{RIGHT}, {OFF}]")), case(said(f"[{RIGHT}]"))
    assert values(both, "count_exact", "count_ratio") == [1, 1] and values(one, "count_exact", "count_ratio") == [
        0,
        0.5,
    ]
    # 99 x 99 of twice that: exactly a half, which does not exceed the threshold; with half of the other, three quarters
    assert values(one, "box_iou", "box_accuracy") == [0.5, 0]
    assert values(both, "box_iou", "box_accuracy") == [pytest.approx((99 + 49) / (2 * 99)), 1]
    assert COMPONENTS["box_accuracy"].measure(one, threshold=0.49) == 1


@pytest.mark.parametrize(
    ("answered", "exact", "ratio"), [(130, 1.0, 1.0), (120, 0.0, 120 / 130), (129, 0.0, 129 / 130)]
)
def test_more_than_120_objects_are_counted(answered: int, exact: float, ratio: float) -> None:
    said = ", ".join(['{"bbox_2d": [0, 0, 8, 10]}'] * answered)
    many = case(f"<answer>[{said}]</answer>", target([(0, 0, 8, 10)] * 130))
    assert values(many, "count_exact", "count_ratio") == [exact, ratio]
    assert many.matched.true == 130


def test_no_target_questions() -> None:
    names = ("matched_iou", "count_ratio", "point_score", "box_iou", "count_exact")
    assert values(case(said("[]"), NOTHING), *names) == [1, 1, 1, 1, 1]
    assert values(case(said(f"[{RIGHT}]"), NOTHING), *names) == [0, 0, 0, 0, 0]
    assert values(case(said("[]")), *names) == [0, 0, 0, 0, 0]
    # published: an empty match is worth 0, and a completion that does not parse counts as an empty list
    assert values(case(said("[]"), NOTHING), *PUBLISHED) == [0, 1, 0]
    assert values(case("gibberish", NOTHING), *PUBLISHED) == [0, 1, 0]


def test_a_completion_without_answer_is_worth_nothing_to_us() -> None:
    one = case("gibberish", NOTHING, mask_iou=1.0, mask_dice=1.0)
    names = set(COMPONENTS) - {"non_repeat", "non_repeat_plain", "dr_seg_count"}
    assert {COMPONENTS[name].measure(one) for name in names} == {0.0}


def test_unknown_component_is_named() -> None:
    with pytest.raises(UserError, match="no component 'mask_iuo'; did you mean 'mask_iou'"):
        reward_terms(RewardConfig(name="mine", components={"mask_iuo": 1}))


PRESETS = CONF / "reward"


@cache
def preset(name: str) -> RewardConfig:
    return compose(["recipe=quickstart", f"reward={name}"]).reward


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_presets_are_valid_and_name_their_source(name: str) -> None:
    config = preset(name)
    assert config.name == name and reward_terms(config)
    assert (PRESETS / f"{name}.yaml").read_text().startswith("# ")


# ---------------------------------------------------------------- combining


def group(*trajectories: Trajectory, task: str = "segment") -> Group:
    return builders.group(*trajectories, about=builders.prompt(builders.sample(task=task)))


def rewards(groups: list[Group], config: RewardConfig, store: object = None) -> list[tuple[float | None, ...]]:
    """None: the trajectory was not measured."""
    done = rewarded(groups, config, store)  # type: ignore[arg-type]
    return [tuple(one.reward for one in each.trajectories) for each in done]


def test_weighted_sum_and_failures() -> None:
    config = RewardConfig(name="mine", components={"mask_iou": 2.0, "parsed": 0.5}, unparsed_reward=-1.0)
    one = group(
        measured(mask_iou=0.5, parsed=1.0),
        unparsed(mask_iou=0.0, parsed=0.0),
        lost(FailureKind.SCORER),
    )
    assert rewards([one], config, None) == [(1.5, -1.0, None)]


def test_published_rule_lets_an_unparsed_answer_keep_its_components() -> None:
    config = RewardConfig(name="mine", components={"non_repeat": 1.0}, unparsed_reward=None)
    assert rewards([group(unparsed(non_repeat=1.0))], config, None) == [(1.0,)]


def test_ranked_components_count_raw_without_a_rank() -> None:
    config = RewardConfig(name="mine", components={}, ranked={"mask_iou": 2.0, "count_exact": 3.0}, rank="none")
    assert make_store(config) is None
    one = group(
        measured(mask_iou=0.25, count_exact=1.0), lost(FailureKind.ENGINE), measured(mask_iou=0.0, count_exact=0)
    )
    assert rewards([one], config, None) == [(3.5, None, 0.0)]


def test_only_ecdf_keeps_a_store() -> None:
    ranked = {"mask_iou": 1.0}
    assert make_store(RewardConfig(name="mine", components={}, ranked=ranked, rank="ecdf")) is not None
    assert make_store(RewardConfig(name="mine", components={}, ranked=ranked, rank="group")) is None
    assert make_store(RewardConfig(name="mine", components={"parsed": 1.0}, rank="ecdf")) is None  # nothing to rank


def test_a_step_is_ranked_against_earlier_steps_only() -> None:
    ecdf = EcdfConfig(warmup=0, initial_zero_rows=1, ties="le", per_task=True, exclude_unparsed=True)
    config = RewardConfig(name="mine", components={"parsed": 1.0}, ranked={"mask_iou": 1.0}, rank="ecdf", ecdf=ecdf)
    store = make_store(config)
    assert store is not None
    step = [
        group(measured(mask_iou=0.2, parsed=1.0), measured(mask_iou=0.6, parsed=1.0)),
        group(unparsed(mask_iou=0.0, parsed=0.0), lost(FailureKind.ENGINE)),
        group(measured(mask_iou=0.9, parsed=1.0), task="count"),
    ]
    assert rewards(step, config, store) == [(2.0, 2.0), (0.0, None), (2.0,)]
    store.flush()
    assert store.state().rows["segment"].ravel().tolist() == pytest.approx([0, 0.2, 0.6])  # no failure among them
    # now: one of three is <= 0.1, three of three are <= 0.7; of the count queue (0, .9) one is <= 0.7
    again = [group(measured(mask_iou=0.1, parsed=1.0), measured(mask_iou=0.7, parsed=1.0))]
    again.append(group(measured(mask_iou=0.7, parsed=1.0), task="count"))
    assert rewards(again, config, store) == [(1 + 1 / 3, 2.0), (1.5,)]


def test_dr_seg_preset_first_and_second_step() -> None:
    """Step 1: everyone has rank 1 in all three. Step 2: 128 zeros and two rows, ranks rounded to one digit."""
    config = preset("dr_seg")
    store = make_store(config)
    assert store is not None

    def full(text: str) -> Trajectory:
        one = case(text)
        metrics = {name: term(one) for name, term in reward_terms(config).items()}
        return measured(**metrics) if one.answered else unparsed(**metrics)

    good, bad = full(said(f"[{RIGHT}, {OFF}]")), full("gibberish")
    # good: think 1 + answer 2 + look 1 + non-repeat 1; bad: non-repeat 1
    assert rewards([group(good, bad)], config, store) == [(8.0, 4.0)]
    store.flush()
    # bad is 0 in all three: 129 of the 130 rows are <= 0, which rounds to 1.0
    assert rewards([group(good, bad)], config, store) == [(8.0, 4.0)]
    for _ in range(20):
        store.append("segment", np.ones((128, 3)))
        store.flush()
    # 2048 rows of ones: a zero has rank 0, half right has rank 0, equal counts rank 1
    assert rewards([group(good, bad)], config, store) == [(6.0, 1.0)]


def test_the_paper_takes_the_mean_where_the_code_takes_the_sum() -> None:
    code, paper = preset("dr_seg"), preset("dr_seg_paper")
    assert (code.ecdf.aggregate, paper.ecdf.aggregate) == ("sum", "mean")
    metrics = dict.fromkeys(reward_terms(code), 0.0)
    # before the first flush everyone has rank 1 in all three
    assert rewards([group(measured(**metrics))], code, make_store(code)) == [(3.0,)]
    assert rewards([group(measured(**metrics))], paper, make_store(paper)) == [(1.0,)]


@pytest.mark.parametrize("ranked", [{}, {"matched_iou": 1.0}])
def test_a_group_of_which_nothing_could_be_measured_gets_nothing(ranked: dict[str, float]) -> None:
    config = RewardConfig(name="test", components={"parsed": 1.0}, ranked=ranked)
    assert rewards([group(lost(FailureKind.ENGINE), lost(FailureKind.SCORER))], config, None) == [(None, None)]
