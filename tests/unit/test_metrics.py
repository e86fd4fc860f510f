"""Guards what an answer is worth: published values by hand, no-target questions, exact areas against pixels."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception import metrics
from perception.matching import Matched, Objects, match
from reward_workers.components.dr_seg import published_objects
from tests.builders import case

TRUE = Objects(boxes=np.array([[100.0, 100, 299, 299]]), points=np.array([[200.0, 200]]))
NONE = Objects(boxes=np.empty((0, 4)), points=np.empty((0, 2)))


def read(text: str) -> Objects:
    found = published_objects(case(text))
    return Objects(boxes=found.boxes, points=found.points)


def count_ratio(matched: Matched) -> float:
    return metrics.count_ratio(matched.answered, matched.true)


def answered(*objects: tuple[list, list]) -> str:
    return f"<answer>{json.dumps([{'bbox_2d': box, 'point_2d': point} for box, point in objects])}</answer>"


def test_a_perfect_answer() -> None:
    matched = match(read(answered(([100, 100, 299, 299], [200, 200]))), TRUE, "binary", pixel=1)
    assert metrics.matched_iou(matched) == count_ratio(matched) == metrics.point_score(matched) == 1
    assert metrics.vision_reasoner(matched) == 3


def test_dr_seg_vector_by_hand() -> None:
    # Box shifted by half its 200 pixels: IoU 100*200 / (2*40000 - 20000) = 1/3. Points 115 apart: (200-115)/170 = 1/2.
    # The second object is spurious: count 1/2; it touches neither x1 nor x3.
    text = answered(([200, 100, 399, 299], [315, 200]), ([600, 600, 700, 700], [650, 650]))
    matched = match(read(text), TRUE, "continuous", pixel=1)
    assert metrics.matched_iou(matched) == pytest.approx(1 / 3)
    assert count_ratio(matched) == 0.5
    assert metrics.point_score(matched) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("distance", "worth"), [(0, 1), (30, 1), (31, 169 / 170), (115, 0.5), (199, 1 / 170), (200, 0), (900, 0)]
)
def test_point_score_falls_from_30_to_200_pixels(distance: float, worth: float) -> None:
    away = Objects(boxes=TRUE.boxes, points=TRUE.points + np.array([distance, 0]))
    assert metrics.point_score(match(away, TRUE, "binary")) == pytest.approx(worth)


def test_vision_reasoner_by_hand() -> None:
    # First: all three hit. Second: IoU 0.9 and L1 (0 + 0 + 20 + 0) / 4 hit, but its point lies outside its box.
    # 5 hits, shared among the 3 answered.
    true = Objects(
        boxes=np.array([[0.0, 0, 100, 100], [400, 400, 600, 600]]), points=np.array([[50.0, 50], [610, 500]])
    )
    found = Objects(
        boxes=np.array([[2.0, 2, 98, 98], [400, 400, 580, 600], [700, 700, 800, 800]]),
        points=np.array([[40.0, 50], [600, 500], [750, 750]]),
    )
    assert metrics.vision_reasoner(match(found, true, "binary", pixel=1)) == pytest.approx(5 / 3)
    assert metrics.vision_reasoner(match(NONE, true, "binary")) == 0


@pytest.mark.parametrize(
    ("box", "point", "hits"),
    [
        ((100, 100, 299, 299), (200, 200), 3),
        ((110, 110, 309, 309), (200, 200), 2),  # L1 exactly 10 px is no hit
        ((110, 110, 309, 308.9), (200, 200), 3),
        ((100, 100, 299, 299), (230, 200), 2),  # nor is a distance of exactly 30 px
        ((100, 100, 299, 299), (218, 224), 2),  # 18, 24, 30: the same aslant
        ((100, 100, 299, 299), (229.9, 200), 3),
        ((100, 100, 299, 199), (200, 190), 1),  # nor an IoU of exactly 1/2; L1 is 25
        ((100, 100, 225, 299), (225, 200), 2),  # a point on the right edge of its own box is inside; L1 is 18.5
        ((100, 100, 225, 299), (225.1, 200), 1),
        ((100, 100, 299, 225), (200, 225), 2),  # on the bottom edge
        ((100, 100, 299, 225), (200, 225.1), 1),
        ((175, 100, 299, 299), (175, 200), 2),  # on the left edge; 125 of 200 px wide: IoU 0.625
        ((100, 175, 299, 299), (200, 175), 2),  # on the top edge
    ],
)
def test_ties_at_the_published_thresholds(box: tuple, point: tuple, hits: float) -> None:
    """The truth is 200 x 200 pixels around (200, 200)."""
    found = Objects(boxes=np.array([box], float), points=np.array([point], float))
    assert metrics.vision_reasoner(match(found, TRUE, "binary", pixel=1)) == hits


def test_no_target_questions() -> None:
    nothing, invented, missed = match(NONE, NONE, "binary"), match(TRUE, NONE, "binary"), match(NONE, TRUE, "binary")
    for metric in (metrics.matched_iou, metrics.point_score):
        assert [metric(matched) for matched in (nothing, invented, missed)] == [1, 0, 0]
        assert metric(nothing, empty=0.0) == 0  # the published systems
    assert [count_ratio(matched) for matched in (nothing, invented, missed)] == [1, 0, 0]
    assert metrics.box_iou(NONE.boxes, NONE.boxes) == 1
    assert metrics.box_iou(TRUE.boxes, NONE.boxes) == metrics.box_iou(NONE.boxes, TRUE.boxes) == 0


def test_unusable_arrays_still_count() -> None:
    matched = match(read(answered(([1, 2, 3], [4, 5]))), TRUE, "binary", pixel=1)
    assert (metrics.matched_iou(matched), count_ratio(matched), metrics.point_score(matched)) == (0, 1, 0)


box = st.tuples(*[st.integers(0, 24)] * 4).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


def painted(boxes: list[tuple[int, int, int, int]]) -> np.ndarray:
    canvas = np.zeros((24, 24), bool)
    for x1, y1, x2, y2 in boxes:
        canvas[y1:y2, x1:x2] = True
    return canvas


@settings(max_examples=80)
@given(st.lists(box, max_size=5), st.lists(box, max_size=5))
def test_covered_areas_equal_painted_pixels(a: list, b: list) -> None:
    arrays = [np.array(boxes, float).reshape(-1, 4) for boxes in (a, b)]
    canvases = [painted(boxes) for boxes in (a, b)]
    either = np.logical_or(*canvases).sum()
    expected = np.logical_and(*canvases).sum() / either if either else 1.0
    assert metrics.box_iou(*arrays) == pytest.approx(expected)


def test_a_missing_box_covers_nothing() -> None:
    boxes = np.array([[0, 0, 10, 10], [np.nan] * 4, [5, 5, 5, 9.0]])
    assert metrics.box_iou(boxes, np.array([[0, 0, 10, 5.0]])) == pytest.approx(0.5)


def square(top: int, left: int, side: int, image: int = 10) -> np.ndarray:
    mask = np.zeros((image, image), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_boundary_iou_by_hand() -> None:
    one, whole, empty = square(2, 2, 4), square(0, 0, 10), square(0, 0, 0)
    # 2 % of the diagonal is less than a pixel, so 1. Two rings of 12 pixels share 3 above and 3 below.
    assert metrics.boundary_iou(one, square(2, 3, 4)) == pytest.approx(6 / 18)
    # The image's border bounds a mask: rings of 36 and 28 pixels one inside the other, of masks with an IoU of 0.64.
    assert metrics.boundary_iou(whole, square(1, 1, 8)) == 0
    # 20 %: 3 pixels. The outer one leaves 4 x 4, the inner 2 x 2, their rings of 84 and 60 share 8 x 8 - 4 x 4.
    assert metrics.boundary_iou(whole, square(1, 1, 8), ratio=0.2) == pytest.approx(48 / 96)
    assert metrics.boundary_iou(square(5, 5, 1), square(5, 5, 1)) == metrics.boundary_iou(empty, empty) == 1
    assert metrics.boundary_iou(one, empty) == metrics.boundary_iou(empty, one) == 0


def test_s_measure_by_hand() -> None:
    true, answered = np.zeros((2, 4), bool), np.zeros((2, 4), bool)
    true[:, :2], answered[:, 1:3] = True, True
    # Objects: half of the target's 4 pixels and half of the other 4 agree: 2 * 0.5 / (0.25 + 1 + sqrt(0.25 * 4 / 3)).
    # Parts, cut after row 0 and column 0: 1 pixel (1 by definition) and 3, of which 2 answered, 1 true, 1 both:
    # 4 * 2 * 1 * (3 * 1 - 2) / ((4 + 1) * (2 * 1 + 1 * 2)) = 0.4. Twice: (1 + 3 * 0.4) * 2 / 8.
    assert metrics.s_measure(answered, true) == pytest.approx(0.5 * 0.5472406 + 0.5 * 0.55)
    assert metrics.s_measure(answered, true, alpha=1) == pytest.approx(0.5472406)
    assert metrics.s_measure(answered, true, alpha=0) == pytest.approx(0.55)
    assert metrics.s_measure(true, true) == pytest.approx(1)


def test_s_measure_of_empty_and_full_masks() -> None:
    quarter, whole, empty = square(0, 0, 5), square(0, 0, 10), square(0, 0, 0)
    assert [metrics.s_measure(mask, empty) for mask in (empty, quarter, whole)] == [1, 0.75, 0]
    assert [metrics.s_measure(mask, whole) for mask in (empty, quarter, whole)] == [0, 0.25, 1]
    # Nothing answered. Objects: the 75 background pixels agree, 0.75. Parts, cut after row 2 and column 2: the first 9
    # pixels are all target, so nothing varies (1 by definition); the other three vary and hold no answer (0).
    assert metrics.s_measure(empty, quarter) == pytest.approx(0.5 * 0.75 + 0.5 * 0.09)
    assert metrics.s_measure(square(5, 5, 1), square(5, 5, 1)) == 1


def test_s_measure_of_a_large_image() -> None:
    """Products of four counts pass 64 bits. pysodmetrics' value."""
    true = np.zeros((2048, 2048), bool)
    true[300:900, 200:1500] = True
    assert metrics.s_measure(np.roll(true, 7, 1), true) == pytest.approx(0.9863036508)


@pytest.mark.parametrize("metric", [metrics.boundary_iou, metrics.s_measure])
def test_masks_of_different_sizes_are_refused(metric: Callable[[np.ndarray, np.ndarray], float]) -> None:
    with pytest.raises(ValueError, match=r"\(10, 10\) and \(9, 9\)"):
        metric(square(0, 0, 3), square(0, 0, 3, image=9))


@settings(max_examples=60)
@given(st.lists(box, max_size=4), st.lists(box, max_size=4))
def test_mask_likeness_is_bounded_and_whole_for_the_same_mask(a: list, b: list) -> None:
    one, other = painted(a), painted(b)
    for metric in (metrics.boundary_iou, metrics.s_measure):
        assert 0 <= metric(one, other) <= 1 + 1e-12
        assert metric(one, one) == pytest.approx(1)


@settings(max_examples=40)
@given(st.lists(box, max_size=6), st.lists(box, max_size=6), st.sampled_from(["binary", "continuous"]))
def test_every_metric_is_finite_and_bounded(a: list, b: list, cost: str) -> None:
    arrays = [np.array(boxes, float).reshape(-1, 4) for boxes in (a, b)]
    sides = [Objects(boxes=array, points=array[:, :2]) for array in arrays]
    matched = match(*sides, cost)
    for metric in (metrics.matched_iou, count_ratio, metrics.point_score):
        assert 0 <= metric(matched) <= 1
    assert 0 <= metrics.vision_reasoner(matched) <= 3
