"""Guards questions about what is not there: only a parsed empty list says so, by every measure, by a real SAM2."""

from __future__ import annotations

import numpy as np
import pytest

from perception.config import LookConfig, RewardConfig
from perception.tasks import TASKS
from perception.types import LookState, Trajectory
from reward_workers.components import COMPONENTS
from reward_workers.worker import RewardWorker
from tests import builders, tiny_segmenter
from tests.builders import SIDE, group, noise_image, rectangle, target, trajectory

MEASURES = (
    "mask_iou",
    "mask_dice",
    "boundary_iou",
    "s_measure",
    "box_iou",
    "matched_iou",
    "point_score",
    "count_exact",
)
OUTSIDE = {  # on each side, at a corner, along an edge, without an area, and points alone
    "left": '[{"bbox_2d": [-50, 10, -5, 60], "point_2d": [-20, 30]}]',
    "right": f'[{{"bbox_2d": [{SIDE + 5}, 10, {SIDE + 90}, 60]}}]',
    "above": '[{"bbox_2d": [10, -90, 60, -1], "point_2d": [30, -40]}]',
    "below": f'[{{"bbox_2d": [10, {SIDE + 1}, 60, {SIDE + 40}]}}]',
    "corner": f'[{{"bbox_2d": [{SIDE}, {SIDE}, {SIDE + 9}, {SIDE + 9}]}}]',
    "edge": f'[{{"bbox_2d": [{SIDE}, 0, {SIDE}, 60]}}]',
    "flat": '[{"bbox_2d": [20, 20, 20, 20]}]',
    "point": f'[{{"point_2d": [{SIDE}, 5]}}]',
    "points": f'[{{"point_2d": [-1, 5]}}, {{"point_2d": [5, {SIDE + 300}]}}]',
    "far": '[{"bbox_2d": [900000, 900000, 1000000, 1000000]}]',
}
UNPARSED = ("[", "[{}]", "null", '{"bbox_2d": [1, 2, 3, 4]}', '[{"bbox_2d": [9, 9, 1, 1]}]')
CONFIG = RewardConfig(name="all", components=dict.fromkeys(MEASURES, 1.0))
LOOK = LookState(weights=(), threshold=1.0, explore=0.0)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> RewardWorker:
    made = RewardWorker(CONFIG, LookConfig(), tiny_segmenter.build(tmp_path_factory.mktemp("segmenter")), "cpu", 1)
    made.start()
    return made


def answered(worker: RewardWorker, *answers: str, look: LookState | None = None) -> tuple[Trajectory, ...]:
    """Scored answers to a question about what is not there."""
    asked = builders.prompt(builders.sample(truth=target()), images=(noise_image(0),))
    made = (trajectory(f"<think></think><answer>{one}</answer>") for one in answers)
    return worker.score(group(*made, about=asked), look=look).trajectories


def metrics(one: Trajectory) -> dict[str, float]:
    assert one.score is not None
    return dict(one.score.metrics)


@pytest.mark.parametrize("look", [None, LOOK])
def test_objects_outside_the_image_are_no_refusal(worker: RewardWorker, look: LookState | None) -> None:
    *outside, refused = answered(worker, *OUTSIDE.values(), " [ ] ", look=look)
    assert set(metrics(refused).values()) == {1.0}
    for name, one in zip(OUTSIDE, outside, strict=True):
        assert set(metrics(one).values()) == {0.0}, name
        assert one.score is not None and one.score.best.mask_iou == 0.0 and one.failure is None


def test_what_does_not_parse_is_no_refusal(worker: RewardWorker) -> None:
    for text, one in zip(UNPARSED, answered(worker, *UNPARSED), strict=True):
        assert set(metrics(one).values()) == {0.0}, text


def test_objects_whose_mask_is_empty_are_no_refusal() -> None:
    """The segmenter may draw nothing at all inside the image."""
    empty = np.zeros((SIDE, SIDE), bool)
    named, refused = ("<answer>[" + body + "]</answer>" for body in ('{"bbox_2d": [5, 5, 50, 50]}', ""))
    for name in ("boundary_iou", "s_measure"):
        measure = COMPONENTS[name]
        assert measure(builders.case(named, masks=lambda: (empty, empty))) == 0.0
        assert measure(builders.case(refused, masks=lambda: (empty, empty))) == 1.0
        truth = rectangle(5, 5, 50, 50, SIDE, SIDE)
        assert measure(builders.case(named, masks=lambda truth=truth: (truth, truth))) == 1.0


def test_the_ideal_answer_to_nothing_is_the_refusal(worker: RewardWorker) -> None:
    """What a task writes about no target is what is worth 1."""
    frame = builders.case("").image
    text = TASKS["segment"].write(target(), frame)
    assert text.endswith("<answer>[]</answer>")
    (one,) = answered(worker, "[]")
    assert metrics(one)["mask_iou"] == 1.0
