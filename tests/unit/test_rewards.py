"""Guards the reward components (values worked out by hand), the presets, and the rule that combines them."""

from __future__ import annotations

import numpy as np
import pytest

from launch.run.config import CONF, compose
from perception import answers
from perception.config import EcdfConfig, RewardConfig
from perception.frames import Frame, convert_answer
from perception.types import (
    Answer,
    Failure,
    FailureKind,
    Group,
    Prompt,
    Sample,
    Score,
    ScoredGroup,
    Target,
    Trajectory,
    View,
)
from reward_workers.combine import combine, make_store
from reward_workers.rewards import COMPONENTS, Case, components_in_use

SIDE = Frame(840, 840)
TRUTH = Target(
    boxes=np.array([[100, 100, 199, 199], [400, 400, 499, 499]], np.float32),
    points=np.array([[150, 150], [450, 450]], np.float32),
)
NOTHING = Target(boxes=np.zeros((0, 4), np.float32), points=np.zeros((0, 2), np.float32))
RIGHT = '{"bbox_2d": [100, 100, 199, 199], "point_2d": [150, 150]}'
OFF = '{"bbox_2d": [400, 400, 499, 449], "point_2d": [450, 565]}'  # upper half; the point 115 px below and outside


def said(items: str, think: str = "I see <look>two squares</look> here") -> str:
    return f"<think>{think}</think><answer>{items}</answer>"


def case(text: str, target: Target = TRUTH, published: bool = True, **masks: float) -> Case:
    return Case(
        text=text,
        answer=convert_answer(answers.parse(text, "segment"), SIDE, SIDE),
        target=target,
        image=SIDE,
        view=View(left=0, top=0, right=840, bottom=840, height=840, width=840),
        published=published,
        **masks,
    )


def values(one: Case, *names: str) -> list[float]:
    return [COMPONENTS[name](one) for name in names]


@pytest.mark.parametrize("published", [True, False])
def test_matched_metrics_by_hand(published: bool) -> None:
    one = case(said(f"[{OFF}, {RIGHT}]"), published=published)
    # published: boxes are 100x50 of 100x100 pixels; ours: 99x49 of 99x99
    half = 0.5 if published else 49 / 99
    iou, count, point = values(one, "matched_iou", "count_ratio", "point_score")
    assert iou == pytest.approx((1 + half) / 2)
    assert count == 1
    assert point == pytest.approx((1 + (200 - 115) / 170) / 2)


def test_accuracy_by_hand() -> None:
    # the right one hits all three; the other: IoU .5 is not above .5, L1 = 50/4 = 12.5 px, point outside
    assert values(case(said(f"[{RIGHT}, {OFF}]")), "accuracy") == [1.5]
    assert values(case(said(f"[{RIGHT}]")), "accuracy") == [1.5]
    assert values(case("gibberish"), "accuracy") == [0]


def test_thresholds_hold_in_the_840_frame_whatever_the_image() -> None:
    """The same picture at a quarter of the size, answered in yet another frame."""
    small = Target(boxes=TRUTH.boxes / 4, points=TRUTH.points / 4)
    text = said('[{"bbox_2d": [50, 50, 99.5, 99.5], "point_2d": [75, 75]}]')
    image, written = Frame(210, 210), Frame(420, 420)
    view = View(left=0, top=0, right=210, bottom=210, height=420, width=420)
    answer = convert_answer(answers.parse(text, "segment"), written, image)
    one = Case(text=text, answer=answer, target=small, image=image, view=view, published=True)
    assert values(one, "matched_iou", "count_ratio", "point_score", "accuracy") == [1, 0.5, 1, 1.5]


def test_text_components() -> None:
    good = case(said(f"[{RIGHT}]"))
    assert values(good, "think_format", "answer_format", "look", "non_repeat", "parsed") == [1, 2, 1, 1, 1]
    bad = case("I see it. I see it. I see it.")
    assert values(bad, "think_format", "answer_format", "look", "non_repeat", "parsed") == [0, 0, 0, 0, 0]
    assert values(bad, "non_repeat_plain") == [0]
    assert values(case("Yes! Yes! Yes!"), "non_repeat", "non_repeat_plain") == [0, 1]


def test_no_target_questions() -> None:
    names = ("matched_iou", "count_ratio", "point_score", "box_iou", "count_exact")
    assert values(case(said("[]"), NOTHING, published=False), *names) == [1, 1, 1, 1, 1]
    assert values(case(said(f"[{RIGHT}]"), NOTHING, published=False), *names) == [0, 0, 0, 0, 0]
    assert values(case(said("[]"), published=False), *names) == [0, 0, 0, 0, 0]
    # published: an empty match is worth 0, and a completion that does not parse counts as an empty list
    assert values(case(said("[]"), NOTHING), *names[:3]) == [0, 1, 0]
    assert values(case("gibberish", NOTHING), *names[:3]) == [0, 1, 0]


def test_a_completion_without_answer_is_worth_nothing_to_us() -> None:
    one = case("gibberish", NOTHING, published=False, mask_iou=1.0, mask_dice=1.0)
    names = set(COMPONENTS) - {"non_repeat", "non_repeat_plain"}
    assert {COMPONENTS[name](one) for name in names} == {0.0}


def test_unknown_component_is_named() -> None:
    with pytest.raises(ValueError, match="'mask_iuo'"):
        components_in_use(RewardConfig(name="mine", components={"mask_iuo": 1}))


PRESETS = CONF / "reward"


def preset(name: str) -> RewardConfig:
    return compose(["recipe=quickstart", f"reward={name}"]).reward


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_presets_are_valid_and_name_their_source(name: str) -> None:
    config = preset(name)
    assert config.name == name and components_in_use(config)
    assert (PRESETS / f"{name}.yaml").read_text().startswith("# ")


# ---------------------------------------------------------------- combining


def scored(*scores: Score, task: str = "segment") -> ScoredGroup:
    sample = Sample(id="s", image_path="", height=840, width=840, question="", task=task, target=TRUTH)
    prompt = Prompt(sample=sample, token_ids=(), images=(), answer_height=840, answer_width=840, seed=0)
    trajectories = tuple(Trajectory(index=i, turns=()) for i in range(len(scores)))
    return ScoredGroup(group=Group(prompt=prompt, trajectories=trajectories), scores=scores, seconds=0, cached=False)


def score(failure: FailureKind | None = None, **metrics: float) -> Score:
    reason = Failure(kind=failure, detail="test") if failure else None
    return Score(metrics=metrics, answer=Answer(objects=(), failure=reason), failure=reason)


def test_weighted_sum_and_failures() -> None:
    config = RewardConfig(name="mine", components={"mask_iou": 2.0, "parsed": 0.5}, unparsed_reward=-1.0)
    group = scored(
        score(mask_iou=0.5, parsed=1.0),
        score(FailureKind.UNPARSED, mask_iou=0.0, parsed=0.0),
        score(FailureKind.SCORER),
    )
    assert combine([group], config, None) == [(1.5, -1.0, 0.0)]


def test_published_rule_lets_an_unparsed_answer_keep_its_components() -> None:
    config = RewardConfig(name="mine", components={"non_repeat": 1.0}, unparsed_reward=None)
    assert combine([scored(score(FailureKind.UNPARSED, non_repeat=1.0))], config, None) == [(1.0,)]


def test_ranked_components_count_raw_without_a_rank() -> None:
    config = RewardConfig(name="mine", components={}, ranked={"mask_iou": 2.0, "count_exact": 3.0}, rank="none")
    assert make_store(config) is None
    group = scored(score(mask_iou=0.25, count_exact=1.0), score(FailureKind.ENGINE), score(mask_iou=0.0, count_exact=0))
    assert combine([group], config, None) == [(3.5, 0.0, 0.0)]


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
        scored(score(mask_iou=0.2, parsed=1.0), score(mask_iou=0.6, parsed=1.0)),
        scored(score(FailureKind.UNPARSED, mask_iou=0.0, parsed=0.0), score(FailureKind.ENGINE)),
        scored(score(mask_iou=0.9, parsed=1.0), task="count"),
    ]
    assert combine(step, config, store) == [(2.0, 2.0), (0.0, 0.0), (2.0,)]
    store.flush()
    assert store.state().rows["segment"].ravel().tolist() == pytest.approx([0, 0.2, 0.6])  # no failure among them
    # now: one of three is <= 0.1, three of three are <= 0.7; of the count queue (0, .9) one is <= 0.7
    again = [scored(score(mask_iou=0.1, parsed=1.0), score(mask_iou=0.7, parsed=1.0))]
    again.append(scored(score(mask_iou=0.7, parsed=1.0), task="count"))
    assert combine(again, config, store) == [(1 + 1 / 3, 2.0), (1.5,)]


def test_dr_seg_preset_first_and_second_step() -> None:
    """Step 1: everyone has rank 1 in all three. Step 2: 128 zeros and two rows, ranks rounded to one digit."""
    config = preset("dr_seg")
    store = make_store(config)
    assert store is not None
    names = components_in_use(config)

    def full(text: str) -> Score:
        one = case(text)
        return Score(
            metrics={name: COMPONENTS[name](one) for name in names}, answer=one.answer, failure=one.answer.failure
        )

    good, bad = full(said(f"[{RIGHT}, {OFF}]")), full("gibberish")
    # good: think 1 + answer 2 + look 1 + non-repeat 1; bad: non-repeat 1
    assert combine([scored(good, bad)], config, store) == [(8.0, 4.0)]
    store.flush()
    # bad is 0 in all three: 129 of the 130 rows are <= 0, which rounds to 1.0
    assert combine([scored(good, bad)], config, store) == [(8.0, 4.0)]
    for _ in range(20):
        store.append("segment", np.ones((128, 3)))
        store.flush()
    # 2048 rows of ones: a zero has rank 0, half right has rank 0, equal counts rank 1
    assert combine([scored(good, bad)], config, store) == [(6.0, 1.0)]


def test_the_paper_takes_the_mean_where_the_code_takes_the_sum() -> None:
    code, paper = preset("dr_seg"), preset("dr_seg_paper")
    assert (code.ecdf.aggregate, paper.ecdf.aggregate) == ("sum", "mean")
    metrics = dict.fromkeys(components_in_use(code), 0.0)
    # before the first flush everyone has rank 1 in all three
    assert combine([scored(score(**metrics))], code, make_store(code)) == [(3.0,)]
    assert combine([scored(score(**metrics))], paper, make_store(paper)) == [(1.0,)]


@pytest.mark.parametrize("ranked", [{}, {"matched_iou": 1.0}])
def test_a_group_of_which_nothing_could_be_measured_gets_nothing(ranked: dict[str, float]) -> None:
    config = RewardConfig(name="test", components={"parsed": 1.0}, ranked=ranked)
    assert combine([scored(score(FailureKind.ENGINE), score(FailureKind.SCORER))], config, None) == [(0.0, 0.0)]
