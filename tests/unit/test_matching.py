"""Guards who is matched with whom, on values worked out by hand: the published binary cost and the continuous one."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception.frames import METRIC, Frame
from perception.matching import (
    Objects,
    match,
    objects_of_answer,
    objects_of_target,
    pairwise_distance,
    pairwise_iou,
    pairwise_l1,
    points_inside,
)
from perception.types import Answer, AnswerObject
from tests.builders import target


def objects(*boxes: tuple[float, float, float, float]) -> Objects:
    """Boxes with their centres as points."""
    array = np.array(boxes, float).reshape(-1, 4)
    return Objects(boxes=array, points=(array[:, :2] + array[:, 2:]) / 2)


def test_pairwise_measures_by_hand() -> None:
    a = np.array([[0, 0, 10, 10], [0, 0, 4, 4.0]])
    b = np.array([[5, 0, 15, 10], [0, 0, 10, 10], [20, 20, 30, 30.0]])
    # 50 / 150, whole; 16 / 100 for the small one inside.
    np.testing.assert_allclose(pairwise_iou(a, b), [[1 / 3, 1, 0], [0, 0.16, 0]])
    np.testing.assert_allclose(pairwise_l1(a, b)[0], [2.5, 0, 20])
    np.testing.assert_allclose(pairwise_distance(np.array([[0, 0.0]]), np.array([[3, 4], [0, 0.0]])), [[5, 0]])


def test_the_published_iou_counts_both_edge_pixels() -> None:
    a, b = np.array([[0, 0, 9, 9.0]]), np.array([[5, 0, 14, 9.0]])
    assert pairwise_iou(a, b, pixel=1)[0, 0] == pytest.approx(50 / 150)
    assert pairwise_iou(a, b)[0, 0] == pytest.approx(36 / 126)


def test_a_missing_box_or_point_matches_nothing() -> None:
    nothing = np.full((1, 4), np.nan)
    box, point = np.array([[0, 0, 10, 10.0]]), np.array([[5, 5.0]])
    assert pairwise_iou(nothing, box).item() == 0
    assert pairwise_l1(nothing, box).item() == np.inf
    assert pairwise_distance(nothing[:, :2], point).item() == np.inf
    assert not points_inside(point, nothing).item()
    for cost in ("binary", "continuous"):
        matched = match(Objects(boxes=nothing, points=point), Objects(boxes=box, points=point), cost)
        assert (matched.iou.tolist(), matched.distance.tolist(), matched.hits.tolist()) == ([0], [0], [0])


def test_absurd_numbers_stay_finite() -> None:
    huge = np.array([[-1e300, -1e300, 1e300, 1e300]])
    iou = pairwise_iou(huge, np.array([[0, 0, 10, 10.0]]), pixel=1)
    assert np.isfinite(iou).all()
    assert len(match(Objects(boxes=huge, points=huge[:, :2]), objects((0, 0, 9, 9)), "continuous").rows) == 1


def test_the_continuous_cost_pairs_near_misses_where_the_binary_cost_is_blind() -> None:
    true = objects((0, 0, 100, 100), (500, 500, 600, 600))
    answered = objects((440, 440, 540, 540), (60, 60, 160, 160))  # crosswise, and every threshold missed
    assert match(answered, true, "continuous").columns.tolist() == [1, 0]
    assert match(answered, true, "binary").columns.tolist() == [0, 1]  # all costs 3: by order


def test_only_the_continuous_cost_pairs_poor_boxes_whatever_their_order() -> None:
    """Three answers, each 60 px right of its object: IoU 0.4 / 1.6, L1 30 px, points 60 px apart. All miss all."""
    true = [(0.0, 0.0, 100.0, 100.0), (200.0, 0.0, 300.0, 100.0), (0.0, 300.0, 100.0, 400.0)]
    answered = [(left + 60, top, right + 60, bottom) for left, top, right, bottom in true]
    found: dict[str, set[float]] = {"binary": set(), "continuous": set()}
    for order in permutations(answered):
        for cost, means in found.items():
            means.add(round(match(objects(*order), objects(*true), cost).iou.mean(), 6))
    # Nearest is right for all three, for one alone, or for none: what the order of the list happens to give.
    assert found["binary"] == {0.25, 0.083333, 0.0}
    assert found["continuous"] == {0.25}


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("box", "iou", "published_iou", "l1"),
    [
        ((50, 50, 50, 50), 0, 1 / 10201, 50),  # no area; published: one pixel of 101 x 101
        ((0, 50, 100, 50), 0, 1 / 101, 25),
        ((100, 100, 0, 0), 0, 0, 100),  # inverted
        ((-100, -100, 0, 0), 0, 1 / 20401, 100),  # outside, touching; published: they share the corner's pixel
        ((-300, 0, -200, 100), 0, 0, 150),
        ((-50, 0, 50, 100), 1 / 3, 51 / 151, 25),  # half outside
        ((-1e300, -1e300, 1e300, 1e300), 0, 0, 1e300),
        ((0, 0, INF, 100), 0, 0, INF),
        ((INF, INF, INF, INF), 0, 0, INF),
        ((NAN, 0, 100, 100), 0, 0, INF),
    ],
)
def test_improper_boxes_have_defined_values(box: tuple, iou: float, published_iou: float, l1: float) -> None:
    one, true = np.array([box], float), np.array([[0.0, 0, 100, 100]])
    assert pairwise_iou(one, true).item() == pytest.approx(iou)
    assert pairwise_iou(one, true, pixel=1).item() == pytest.approx(published_iou)
    assert pairwise_l1(one, true).item() == pytest.approx(l1)
    assert pairwise_iou(one, one).item() in (0, 1)  # with itself: 1 only where there is a finite area
    for cost in ("binary", "continuous"):
        matched = match(Objects(boxes=one, points=one[:, :2]), Objects(boxes=true, points=true[:, :2]), cost)
        assert (len(matched.iou), matched.iou.item()) == (1, pytest.approx(iou))


def test_the_binary_cost_takes_the_pairing_with_most_hits() -> None:
    true = objects((0, 0, 100, 100), (0, 0, 120, 120))
    answered = objects((0, 0, 160, 160), (0, 0, 101, 101))
    # The first hits nothing of the 100 (IoU 0.39, L1 30, point 42 px off) but two of the 120 (IoU 0.56, point 28 px);
    # the second hits all three of either. Straight 0 + 3, crosswise 2 + 3.
    assert match(answered, true, "binary").columns.tolist() == [1, 0]


def test_a_point_counts_only_inside_its_own_box() -> None:
    true = objects((0, 0, 100, 100))
    outside = Objects(boxes=np.array([[60.0, 60, 160, 160]]), points=np.array([[50.0, 50]]))
    matched = match(outside, true, "binary")
    assert (matched.distance.tolist(), matched.hits.tolist()) == ([0], [0])


def test_a_point_on_an_edge_of_its_box_is_inside() -> None:
    points = np.array([[10, 5], [5, 10], [0, 5], [5, 0], [10, 10], [10.001, 5], [5, 10.001], [-0.001, 5]])
    assert points_inside(points, np.array([[0.0, 0, 10, 10]] * 8)).tolist() == [True] * 5 + [False] * 3


FAR = np.array([[800.0, 0.0], [0.0, 800.0]])
SMALL = np.array([0.0, 0.0, 8.0, 8.0])


@pytest.mark.parametrize(
    ("answered", "true"),
    [
        # L1: 8 px squares at 10 and 29 on the diagonal, against 0 and 19: their IoU is 0, their points are far.
        (
            Objects(boxes=SMALL + np.array([[10], [29]]), points=FAR),
            Objects(boxes=SMALL + np.array([[0], [19]]), points=FAR),
        ),
        # Distance: points at 30 and 89 against 0 and 59; the answered boxes hold them and are far from the true ones.
        (
            Objects(boxes=np.array([[0.0, 0, 90, 9]] * 2), points=np.array([[30.0, 5], [89, 5]])),
            Objects(boxes=np.array([[500.0, 500, 600, 600]] * 2), points=np.array([[0.0, 5], [59, 5]])),
        ),
        # IoU: half of 200 px, half of 300 px; the first answer covers three quarters of the second truth.
        (
            Objects(boxes=np.array([[0.0, 0, 100, 200], [0, 50, 100, 350]]), points=FAR),
            Objects(boxes=np.array([[0.0, 0, 100, 100], [0, 50, 100, 200]]), points=FAR),
        ),
    ],
    ids=["L1", "distance", "IoU"],
)
def test_what_lies_exactly_on_a_threshold_is_no_hit(answered: Objects, true: Objects) -> None:
    """Straight, both pairs lie exactly on one threshold and miss the others; crosswise, one pair is a hit."""
    assert match(answered, true, "binary").columns.tolist() == [1, 0]


def test_empty_sides_give_no_pairs() -> None:
    for answered, true in (
        (objects(), objects()),
        (objects((0, 0, 1, 1)), objects()),
        (objects(), objects((0, 0, 1, 1))),
    ):
        matched = match(answered, true, "binary")
        assert len(matched.iou) == len(matched.rows) == 0
        assert (matched.answered, matched.true) == (len(answered), len(true))


def test_objects_are_measured_in_the_metric_frame() -> None:
    answer = Answer(objects=(AnswerObject(box=(0, 0, 500, 250)), AnswerObject(point=(1000, 1000))))
    answered = objects_of_answer(answer, Frame(1000, 1000))
    assert answered.boxes[0].tolist() == [0, 0, 420, 210]
    assert np.isnan(answered.boxes[1]).all()
    assert answered.points[1].tolist() == [METRIC.width, METRIC.height]
    true = objects_of_target(target([(0, 0, 42, 84)] * 130), Frame(84, 84))
    assert len(true) == 130
    assert true.boxes[0].tolist() == [0, 0, 420, 840]


corner = st.integers(0, 800)
box = st.tuples(corner, corner, st.integers(1, 300), st.integers(1, 300)).map(
    lambda b: (float(b[0]), float(b[1]), float(b[0] + b[2]), float(b[1] + b[3]))
)
few = st.lists(box, min_size=1, max_size=4)


@settings(max_examples=60)
@given(answered=few, true=few)
def test_no_other_pairing_is_cheaper(answered: list, true: list) -> None:
    """Against trying them all, with the documented cost written out anew."""

    def cost(a: tuple, b: tuple) -> float:
        width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        both = width * height
        areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
        l1 = sum(abs(p - q) for p, q in zip(a, b, strict=True)) / 4
        dx, dy = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
        return 1 - both / (areas - both) + min(1, l1 / 840) + min(1, (dx**2 + dy**2) ** 0.5 / (840 * 2**0.5))

    matched = match(objects(*answered), objects(*true), "continuous")
    total = sum(cost(answered[i], true[j]) for i, j in zip(matched.rows, matched.columns, strict=True))
    short, long = sorted((answered, true), key=len)
    best = min(
        sum(cost(short[i], long[j]) for i, j in enumerate(order))
        for order in permutations(range(len(long)), len(short))
    )
    assert total == pytest.approx(best)
