"""Guards Perception-R1's rewards, corrected and as released: values by hand, values made with the released code, and a
second implementation of detection that tries every pairing."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception import metrics
from perception.types import Answer, AnswerObject, Target
from reward_workers.components import COMPONENTS, Case
from tests import builders
from tests.builders import target
from tests.hostile_text import completions
from tests.presets import reward

Box = tuple[float, float, float, float]
SIDE = 1000


def answer(*items: tuple[Box | None, str | None]) -> Answer:
    return Answer(objects=tuple(AnswerObject(box=box, label=label) for box, label in items))


def case(text: str, said: Answer, truth: Target, side: int = SIDE) -> Case:
    return builders.case(text, truth, side, answer=said)


# ---------------------------------------------------------------- form, grounding, counting

NAME, PLACE = "<|object_ref_start|>dogs<|object_ref_end|>", "<|box_start|>(1,2),(3,4)<|box_end|>"
FORMS = [  # text, corrected, as released
    (NAME + PLACE, 1, 1),
    (NAME + PLACE * 3, 1, 1),
    (NAME, 0, 1),
    (PLACE, 0, 1),
    (NAME + PLACE + "<|im_end|>", 0, 1),  # the end of the turn is no part of a text
    (NAME + PLACE + " so", 0, 1),
    ("so " + NAME + PLACE, 0, 0),
    (NAME + " " + PLACE, 0, 1),
    (NAME.replace("dogs", "a<b") + PLACE, 0, 1),
    ("<", 0, 1),
    ("> any", 0, 1),
    ("box_start", 0, 1),
    ("im_end of it", 0, 1),
    ("object_ref", 0, 0),
    ("[1, 2, 3, 4]", 0, 0),
    ("", 0, 0),
]


@pytest.mark.parametrize(("text", "corrected", "released"), FORMS)
def test_form_and_squared_iou(text: str, corrected: int, released: int) -> None:
    one = case(text, answer(((100, 100, 300, 300), None)), target([(150, 100, 350, 300)]))  # IoU 150/250
    assert reward("perception_r1_grounding", one) == pytest.approx(corrected + 0.36)
    assert reward("perception_r1_grounding_as_released", one) == pytest.approx(released + 0.36)


@pytest.mark.parametrize(
    ("said", "truth", "value"),
    [
        (answer(((0, 0, 10, 10), None)), target([(0, 0, 10, 10)]), 1),
        (answer(((0, 0, 10, 10), None)), target([(0, 0, 10, 5)]), 0.25),
        (answer(((0, 0, 10, 10), None)), target([(10, 0, 20, 10)]), 0),  # they touch
        (answer(((50, 50, 60, 60), None), ((0, 0, 10, 10), None)), target([(0, 0, 10, 10)]), 0),  # the first counts
        (answer(((0, 0, 10, 10), None)), target([(0, 0, 10, 5), (0, 0, 10, 10)]), 0.25),
        (answer((None, None)), target([(0, 0, 10, 10)]), 0),
        (answer(), target([(0, 0, 10, 10)]), 0),
        (answer(((0, 0, 10, 10), None)), target(), 0),
        (answer(((5, 5, 5, 5), None)), target([(0, 0, 10, 10)]), 0),
    ],
)
def test_squared_iou_of_the_first_box(said: Answer, truth: Target, value: float) -> None:
    assert COMPONENTS["first_box_iou"].measure(case("", said, truth), power=2) == pytest.approx(value)


def middles(*points: tuple[float, float]) -> Answer:
    return answer(*(((x - 50, y - 30, x + 50, y + 30), None) for x, y in points))


def points(*found: tuple[float, float]) -> Target:
    return Target(boxes=np.zeros((0, 4), np.float32), points=np.array(found, np.float32).reshape(-1, 2))


D = 1000 * 2**0.5
COUNTS = [  # answer, truth, corrected, as released
    (middles((100, 100), (500, 500)), points((110, 100), (500, 530), (900, 900)), 0.657239, 0.657239),
    (middles((100, 100)), points((100, 100)), 1, 1),
    (middles((500, 500), (100, 100)), points((100, 100), (500, 500)), 1, 1),
    (middles((100, 100)), points((100, 100), (900, 900)), 0.5, 0.5),
    (middles((100, 100), (200, 200), (900, 900), (800, 800)), points((100, 100)), 0.25, 0.25),
    (middles((0, 0)), points((1000, 1000)), 0, 0),
    (middles((0, 0)), points((300, 400)), 1 - 500 / D, 1 - 500 / D),
    (middles((0, 0), (100, 0)), points((100, 0), (0, 10)), 1 - 5 / D, 1 - 5 / D),
    (middles((5000, 0)), points((0, 0)), 0, 1 - 5000 / D),
    (middles(), points((0, 0)), 0, 0),
    (middles(), points(), 1, 0),
    (middles((0, 0)), points(), 0, 0),
    (answer((None, "dog")), points((0, 0)), 0, 0),
    (builders.answer(failed=True), points(), 0, 0),
]


@pytest.mark.parametrize(("said", "truth", "corrected", "released"), COUNTS)
@pytest.mark.parametrize("side", [1000, 500])
def test_counting(said: Answer, truth: Target, corrected: float, released: float, side: int) -> None:
    """Distances are measured in a frame of 1000, whatever the image."""
    scale = side / SIDE
    shrunk = [replace(one, box=tuple(scale * number for number in one.box)) if one.box else one for one in said.objects]
    smaller = replace(truth, points=truth.points * scale)
    one = case(NAME + PLACE, replace(said, objects=tuple(shrunk)), smaller, side)
    assert reward("perception_r1_counting", one) == pytest.approx(corrected, abs=1e-6)
    assert reward("perception_r1_counting_as_released", one) == pytest.approx(released, abs=1e-6)


def test_counting_needs_the_form() -> None:
    one = case("[1, 2, 3, 4]", middles((0, 0)), points((0, 0)))
    assert reward("perception_r1_counting", one) == reward("perception_r1_counting_as_released", one) == 0


# ---------------------------------------------------------------- detection

TRUE = [((12, 8, 108, 112), "person"), ((205, 200, 300, 300), "cat")]
SAID = [((10, 10, 110, 110), "person"), ((200, 200, 300, 280), "dog"), ((400, 50, 450, 90), "car")]
IOU = 0.846088  # of the first two, on average


def truth(*items: tuple[Box, str]) -> Target:
    return replace(target([box for box, _ in items]), labels=tuple(label for _, label in items))


def detected(*items: object, true: Target | None = None, text: str = "") -> Case:
    """`items`: (box, label), or anything else that stands in the list and cannot be read."""
    good = [one for one in items if isinstance(one, tuple)]
    written = [{"bbox_2d": one[0], "label": one[1]} if isinstance(one, tuple) else one for one in items]
    said = answer(*good) if good or not items else builders.answer(failed=True)
    return case(text or f"```json\n{json.dumps(written)}\n```", said, truth(*TRUE) if true is None else true)


DETECTIONS = [  # answered, corrected, as released; each without and with the penalty
    (detected(*SAID), (2.196088, 2.029421), (2.196088, 2.029421)),
    (detected(*TRUE), (3, 3), (3, 3)),
    (detected(*TRUE[::-1]), (3, 3), (3, 3)),
    (detected(TRUE[0]), (2.75, 2.5), (2.75, 2.5)),  # 0.25 + 0.75 * 2/3 + 1 + 1, less 0.5 * 0.5
    (detected(*TRUE, *TRUE), (2.75, 2.5), (2.75, 2.5)),
    (detected(*TRUE, 5), (0.25 * 2 / 3 + 2.75,) * 2, (0.25 * 2 / 3 + 2.75,) * 2),
    (detected(*TRUE, {"label": "dog"}, {}, []), (0.1 + 2.75,) * 2, (0.1 + 2.75,) * 2),
    (detected((TRUE[0][0], "dog"), TRUE[1]), (2.5, 2.5), (2.5, 2.5)),  # half of the labels
    (detected(SAID[2]), (0.25, 0), (0.25, 0.25)),  # no pair
    (detected(), (0, 0), (0, 0)),
    (detected(5), (0, 0), (0, 0)),
    (detected(*SAID, true=truth()), (0.25, 0), (0.25, 0.25)),
    (detected(true=truth()), (3, 3), (0, 0)),  # a right refusal
    (detected(5, true=truth()), (0, 0), (0, 0)),
    (detected(*TRUE, {"bbox_2d": [9, 9, 1, 1], "label": "cat"}), (0.25 * 2 / 3 + 2.75,) * 2, (0, 0)),  # inverted
    (detected(*TRUE, {"bbox_2d": [9, 9, 1], "label": "cat"}), (0.25 * 2 / 3 + 2.75,) * 2, (0, 0)),
    (detected(*TRUE, {"bbox_2d": "no", "label": 5}), (0.25 * 2 / 3 + 2.75,) * 2, (0.25 * 2 / 3 + 2.75,) * 2),
    (detected(*TRUE, (TRUE[0][0], "toothbrush")), (2.85, 2.85 - 1 / 6), (0, 0)),  # F1 0.8
    (detected(*TRUE, (TRUE[0][0], "wombat")), (2.85, 2.85 - 1 / 6), (0.25 * 2 / 3 + 2.75,) * 2),  # none of COCO's
    (detected(*TRUE, text="Here: []"), (3, 3), (0, 0)),  # no JSON as a whole
    (detected(*TRUE, text="so <answer>[1, 2, 3, 4]</answer>"), (2.875, 2.875), (0, 0)),
]


@pytest.mark.parametrize(("one", "corrected", "released"), DETECTIONS)
def test_detection(one: Case, corrected: tuple[float, float], released: tuple[float, float]) -> None:
    assert reward("perception_r1_detection", one) == pytest.approx(corrected[0], abs=2e-6)
    assert reward("perception_r1_detection_as_released", one) == pytest.approx(released[0], abs=2e-6)
    measure = COMPONENTS["perception_r1_detection"].measure
    assert measure(one, penalty=True) == pytest.approx(corrected[1], abs=2e-6)
    if "wombat" not in one.text:  # any category, that is
        assert measure(one, penalty=True, released=True) == pytest.approx(released[1], abs=2e-6)


def test_iou_by_size() -> None:
    """IoU .9, .8 and .7 of a large, a middle and a small object: (0.9 + 2 * 0.8 + 3 * 0.7) / (3 * 2.4)."""
    true = [((0, 0, 200, 100), "a"), ((300, 0, 350, 100), "b"), ((500, 0, 530, 10), "c")]
    said = [((0, 0, 200, 90), "a"), ((300, 0, 350, 80), "b"), ((500, 0, 530, 7), "c")]
    one = detected(*said, true=truth(*true))
    value = COMPONENTS["perception_r1_detection"].measure(one, by_size=True)
    assert value - 2 == pytest.approx(0.638889, abs=1e-6)


def iou_and_giou(a: Box, b: Box) -> tuple[float, float]:
    def area(box: Box) -> float:
        return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])

    both = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    hull = area((min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])))
    either = area(a) + area(b) - both
    return both / either, both / either - (hull - either) / hull


def cost(a: tuple[Box, str], b: tuple[Box, str], unit: float, labels: bool) -> float:
    sides = [(x2 - x1, (x1 + x2) / 2) for box in (a[0], b[0]) for x1, x2 in ((box[0], box[2]), (box[1], box[3]))]
    l1 = sum(
        abs(p - q) for one, other in zip(sides[:2], sides[2:], strict=True) for p, q in zip(one, other, strict=True)
    )
    return 5 * l1 / unit - 2 * iou_and_giou(a[0], b[0])[1] - (labels and a[1] == b[1])


sizes = st.tuples(st.integers(0, 90), st.integers(0, 90), st.integers(5, 40), st.integers(5, 40))
boxes = sizes.map(lambda one: (one[0], one[1], one[0] + one[2], one[1] + one[3]))
things = st.lists(st.tuples(boxes, st.sampled_from(["cat", "dog"])), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(said=things, true=things, near=st.booleans(), released=st.booleans())
def test_detection_is_the_best_of_all_pairings(
    said: list[tuple[Box, str]], true: list[tuple[Box, str]], near: bool, released: bool
) -> None:
    if near:
        said = [(tuple(n + 1 for n in box), label) for box, label in true][::-1] + said[:1]
    less, more = sorted((said, true), key=len)
    unit = 1 if released else SIDE
    ways = [list(zip(less, order, strict=True)) for order in permutations(more, len(less))]
    sums = [sum(cost(*(pair if less is said else pair[::-1]), unit, not released) for pair in way) for way in ways]
    one = detected(*said, true=truth(*true))
    values = set()
    for way, total in zip(ways, sums, strict=True):
        if total < min(sums) + 1e-9:  # ties may be broken either way
            kept = [(a, b) for a, b in way if iou_and_giou(a[0], b[0])[0] > 0.5]
            quality = [iou_and_giou(a[0], b[0])[0] + (a[1] == b[1]) for a, b in kept]
            values.add(0.25 + 1.5 * len(kept) / (len(said) + len(true)) + sum(quality) / max(1, len(kept)))
    found = COMPONENTS["perception_r1_detection"].measure(one, released=released)
    assert any(found == pytest.approx(value) for value in values)


# ---------------------------------------------------------------- text

TEXTS = [
    ("kitten", "sitting", 1 - 0.428571),
    ("the cat sat on the mat", "the cat is on the mat", 1 - 0.136364),
    ("one two three four five six", "one two three four five seven", 1 - 0.137931),
    ("Hello  world", "hello world", 0.909091),
    (" a\n\tb ", "a b", 1),
    ("", "abc", 0),
    ("abc", "", 0),
    ("abc", "xyz", 0),
    ("abc", "abcabc", 0.5),
    ("ab", "ba", 0),
    ("left 红", "left 红", 1),
    ("红绿", "红", 0.5),
    ("😀x", "x", 0.5),
]


@pytest.mark.parametrize(("said", "true", "value"), [*TEXTS, *((true, said, value) for said, true, value in TEXTS)])
def test_texts(said: str, true: str, value: float) -> None:
    one = case("", replace(answer(), text=said), replace(target(), complete=False, text=true))
    for preset in ("perception_r1_ocr", "perception_r1_ocr_as_released"):
        assert reward(preset, one) == pytest.approx(value, abs=1e-6)


def test_an_empty_page() -> None:
    nothing = replace(target(), complete=False, text=" ")
    assert reward("perception_r1_ocr", case("", answer(), nothing)) == 1
    assert reward("perception_r1_ocr_as_released", case("", answer(), nothing)) == 0
    assert reward("perception_r1_ocr", case("", builders.answer(failed=True), nothing)) == 0


def plain_distance(a: str, b: str) -> int:
    if not (a and b):
        return len(a) + len(b)
    same = plain_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(same, plain_distance(a[1:], b) + 1, plain_distance(a, b[1:]) + 1)


@settings(max_examples=40)
@given(st.text("ab", max_size=5), st.text("ab", max_size=5))
def test_edit_distance_by_its_definition(a: str, b: str) -> None:
    assert metrics.edit_distance(a, b) == plain_distance(a, b)


def test_hostile_texts_are_measured() -> None:
    names = [name for name in COMPONENTS if name.startswith("perception_r1")]
    for text in completions(100, seed=8):
        one = replace(detected(*SAID, text=text.replace('"point_2d"', '"label"')), target=truth(*TRUE))
        said = replace(one.answer, text=text[:2000])
        values = [COMPONENTS[name].measure(case(one.text, said, replace(one.target, text="page"))) for name in names]
        assert len(values) == 4 and all(0 <= value <= 3 for value in values)
