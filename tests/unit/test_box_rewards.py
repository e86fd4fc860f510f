"""Guards the rewards of LENS, Rex-Omni (soft F1) and CFCamo (to find or to abstain), by hand and by plain loops."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception.types import Answer, AnswerObject, Target
from reward_workers.components import COMPONENTS, Case
from tests import builders
from tests.builders import target
from tests.hostile_text import completions
from tests.presets import reward

Box = tuple[float, float, float, float]
A, B, FAR = (0, 0, 10, 10), (20, 0, 30, 10), (60, 60, 70, 70)
HALF, QUARTER = (0, 0, 10, 5), (0, 0, 5, 5)  # IoU with A


def answer(*items: tuple[Box, str | None] | Box) -> Answer:
    pairs = [one if len(one) == 2 else (one, None) for one in items]
    return Answer(objects=tuple(AnswerObject(box=box, label=label) for box, label in pairs))  # type: ignore[arg-type]


def labelled(*items: tuple[Box, str]) -> Target:
    return replace(target([box for box, _ in items]), labels=tuple(label for _, label in items))


def case(said: Answer, truth: Target, mask_iou: float = 0.0) -> Case:
    return builders.case("", truth, answer=said, mask_iou=mask_iou)


BOXES = {A: 1.0, HALF: 0.5, QUARTER: 0.25, (5, 0, 15, 10): 1 / 3, FAR: 0.0}


@pytest.mark.parametrize(("box", "mask_iou"), product(BOXES, [1.0, 0.75, 0.5, 0.1, 0.0]))
def test_lens_adds_up_squares(box: Box, mask_iou: float) -> None:
    found = reward("lens", case(answer(box), target([A]), mask_iou))
    assert found == pytest.approx(BOXES[box] ** 2 + mask_iou**2)


@pytest.mark.parametrize("said", [Answer(objects=()), builders.answer(failed=True)])
def test_lens_of_nothing(said: Answer) -> None:
    assert reward("lens", case(said, target([A]))) == 0


UNREAD = builders.answer(failed=True)
SOFT = [  # answered, true, precision and recall
    (answer(A), target([A]), 1, 1),
    (answer(HALF), target([A]), 0.5, 0.5),
    (answer(FAR), target([A]), 0, 0),
    (answer(A, B), target([A, B]), 1, 1),
    (answer(B, A), target([A, B]), 1, 1),
    (answer(A), target([A, B]), 1, 0.5),
    (answer(A, B), target([A]), 0.5, 1),
    (answer(A, A, A), target([A]), 1, 1),  # repeating is not punished as such
    (answer(A, A), target([A, B]), 1, 0.5),
    (answer(HALF, QUARTER), target([A]), 0.375, 0.5),
    (answer(HALF, FAR), target([A, B]), 0.25, 0.25),
    (answer(A, HALF), target([A, HALF]), 1, 1),
    (answer((A, "cat")), labelled((A, "cat")), 1, 1),
    (answer((A, "cat")), labelled((A, "dog")), 0, 0),
    (answer((A, "cat"), (A, "dog")), labelled((A, "dog")), 0.5, 1),
    (answer((A, "cat"), (HALF, "dog")), labelled((A, "dog")), 0.25, 0.5),
    (answer((A, "cat"), (B, "cat")), labelled((A, "cat"), (B, "dog")), 0.5, 0.5),
    (answer((A, "Cat")), labelled((A, "cat")), 0, 0),
    (answer(A), labelled((A, "cat")), 0, 0),
    (answer((A, "cat")), target([A]), 1, 1),  # no labels to differ from
    (answer(), target([A]), 0, 0),
    (answer(), target(), 1, 1),
    (answer(A), target(), 0, 0),
    (UNREAD, target(), 0, 0),
    (UNREAD, target([A]), 0, 0),
    (answer(), replace(target(), number=3), 0, 0),
    (Answer(objects=(AnswerObject(point=(1, 1)), AnswerObject(box=A))), target([A]), 0.5, 1),
]


@pytest.mark.parametrize(("said", "truth", "precision", "recall"), SOFT)
def test_soft_f1(said: Answer, truth: Target, precision: float, recall: float) -> None:
    expected = 2 * precision * recall / (precision + recall) if precision else 0
    assert reward("box_soft_f1", case(said, truth)) == pytest.approx(expected)


def iou(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, width) * max(0, height)
    return both / (sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - both)


sizes = st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(5, 50), st.integers(5, 50))
things = st.lists(
    st.tuples(sizes.map(lambda one: (one[0], one[1], one[0] + one[2], one[1] + one[3])), st.sampled_from("ab")),
    min_size=1,
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(things, things)
def test_soft_f1_by_its_definition(said: list[tuple[Box, str]], true: list[tuple[Box, str]]) -> None:
    best = [
        sum(max(iou(one[0], other[0]) * (one[1] == other[1]) for other in others) for one in ones) / len(ones)
        for ones, others in ((said, true), (true, said))
    ]
    expected = 2 * best[0] * best[1] / sum(best) if sum(best) else 0
    assert reward("box_soft_f1", case(answer(*said), labelled(*true))) == pytest.approx(expected)


ANSWERS = {"nothing": answer(), "one": answer(A), "three": answer(A, B, FAR), "unread": UNREAD}
TRUTHS = {"nothing": target(), "one": target([A]), "a count": replace(target(), number=2)}


@pytest.mark.parametrize(("said", "there", "mask_iou"), product(ANSWERS, TRUTHS, [0.0, 0.6, 1.0]))
def test_to_find_or_to_abstain(said: str, there: str, mask_iou: float) -> None:
    """The mask IoU of a missed or invented target is 0, and of a right refusal 1."""
    absent, refused = there == "nothing", said == "nothing"
    measured = float(absent) if absent or refused else mask_iou
    measured = measured if absent == refused and said != "unread" else 0.0
    expected = {True: 2.0 if absent else 1 + measured, False: -1.0}[absent == refused]
    found = reward("detect_or_abstain", case(ANSWERS[said], TRUTHS[there], measured))
    assert found == pytest.approx(0 if said == "unread" else expected + 0.1)


def test_hostile_texts_are_measured() -> None:
    for text in completions(70, seed=9):
        for truth in (target(), target([A]), labelled((A, "a"), (B, "b"))):
            one = builders.case(text, truth)
            assert (
                0 <= COMPONENTS["box_soft_f1"].measure(one) <= 1 and 0 <= COMPONENTS["first_box_iou"].measure(one) <= 1
            )
            assert COMPONENTS["detect_or_abstain"].measure(one) in (-1, 0, 1)
