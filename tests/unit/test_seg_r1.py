"""Guards Seg-R1's rewards, corrected and as released, by the masks and texts whose values were computed beforehand."""

from __future__ import annotations

import numpy as np
import pytest

from reward_workers.components import COMPONENTS, Case
from tests import builders
from tests.hostile_text import completions
from tests.presets import reward

THINK, BOX, POINTS, LABELS = "<think>a</think>", "<bbox>[1,2,3,4]</bbox>", "<points>[[2,3],[1,2]]</points>", "[1,0]"
WHOLE = f"{THINK} {BOX}, {POINTS}, <labels>{LABELS}</labels>"


def mask(rows: str) -> np.ndarray:
    return np.array([[pixel == "1" for pixel in row] for row in rows.split("/")])


TRUE = mask("000000/001100/011110/011110/001100/000000")  # a third of the image
SHIFTED = mask("000000/000110/001111/001111/000110/000000")  # IoU 1/2
ONE, NONE, ALL = TRUE & (np.cumsum(TRUE).reshape(6, 6) == 1), np.zeros_like(TRUE), np.ones_like(TRUE)


def case(answered: np.ndarray = TRUE, text: str = WHOLE, true: np.ndarray = TRUE, failed: bool = False) -> Case:
    iou = (answered & true).sum() / max(1, (answered | true).sum())
    said = builders.answer(failed=True) if failed else builders.answer((1, 2, 3, 4))
    return builders.case(text, answer=said, mask_iou=float(iou), masks=lambda: (answered, true))


@pytest.mark.parametrize(
    ("answered", "released", "corrected"),
    [  # 0.7 IoU + 0.3 (1 - share answered), and + 0.3 S as pysodmetrics has it
        (TRUE, 0.9, 1.0),
        (SHIFTED, 0.55, 0.35 + 0.3 * 0.591006),
        (ALL, 0.233333, 0.7 / 3 + 0.3 * 0.166667),
        (NONE, 0.3, 0.3 * 0.333333),
        (ONE, 0.35, None),
    ],
)
def test_masks_are_worth_what_was_computed_with_the_released_code(
    answered: np.ndarray, released: float, corrected: float | None
) -> None:
    one = case(answered)
    assert reward("seg_r1_as_released", one) == pytest.approx(1 + released, abs=2e-6)
    assert corrected is None or reward("seg_r1", one) == pytest.approx(1 + corrected, abs=2e-6)


def test_as_released_an_empty_mask_beats_the_full_one() -> None:
    values = {name: [reward(name, case(one)) for one in (NONE, ALL)] for name in ("seg_r1_as_released", "seg_r1")}
    assert values["seg_r1_as_released"][0] > values["seg_r1_as_released"][1]
    assert values["seg_r1"][0] < values["seg_r1"][1]


TEXTS = [  # text, with boxes (format, masks count), without boxes
    (WHOLE, (1, True), (1, True)),
    (WHOLE.replace(", ", ""), (1, True), (1, True)),
    (f"{POINTS} <labels>{LABELS}</labels> so {BOX} {THINK}", (1, True), (1, True)),  # any order
    (WHOLE.replace(">a<", "><"), (1, True), (1, True)),  # an empty think block passes
    (WHOLE.replace("<think>a</think>", ""), (0, True), (1, True)),
    (WHOLE.replace("</think>", ""), (0, True), (1, True)),
    (WHOLE.replace(BOX, ""), (0, False), (1, True)),
    (WHOLE.replace(BOX, BOX * 3), (1, True), (1, True)),
    (WHOLE.replace(BOX, "<bbox>[1,2,3]</bbox>"), (0, False), (1, True)),
    (WHOLE.replace(BOX, "<bbox>[1,2,3]</bbox>" + BOX), (1, True), (1, True)),
    (WHOLE.replace(BOX, "<bbox>[1,2,3,4.5]</bbox>"), (0, False), (1, True)),
    (WHOLE.replace(BOX, "<bbox>[-1,2,3,4]</bbox>"), (0, False), (1, True)),
    (WHOLE.replace(BOX, "<bbox>[1,2,3,4]"), (0, False), (1, True)),  # not closed
    (WHOLE.replace("[1,0]", "[1]"), (0, False), (0, False)),
    (WHOLE.replace("[1,0]", "[1,0,1]"), (0, False), (0, False)),
    (WHOLE.replace("[1,0]", "[1,0,]"), (1, True), (1, True)),
    (WHOLE.replace("[1,0]", " [ 1 ,\n0 ] "), (1, True), (1, True)),
    (WHOLE.replace("[1,0]", "[1 0]"), (0, False), (0, False)),
    (WHOLE.replace("[1,0]", "[1,7]"), (1, True), (1, True)),  # any number is a label
    (WHOLE.replace("[1,0]", "[[1],[0]]"), (0, False), (0, False)),
    (WHOLE.replace("[[2,3],[1,2]]", "[[2,3],[1,2],]"), (1, True), (1, True)),
    (WHOLE.replace("[[2,3],[1,2]]", "[[2,3],[1,2,3]]"), (0, False), (0, False)),
    (WHOLE.replace("[[2,3],[1,2]]", "[2,3]"), (0, False), (0, False)),
    (WHOLE.replace("[[2,3],[1,2]]", "[[2,3][1,2]]"), (0, False), (0, False)),
    (WHOLE.replace("[[2,3],[1,2]]", "[[2.0,3],[1,2]]"), (0, False), (0, False)),
    (WHOLE.replace("[[2,3],[1,2]]", "[]").replace("[1,0]", "[]"), (0, False), (0, False)),
    ("", (0, False), (0, False)),
]


@pytest.mark.parametrize(("text", "boxed", "points_alone"), TEXTS)
def test_form_gates_the_masks(text: str, boxed: tuple[int, bool], points_alone: tuple[int, bool]) -> None:
    for preset, (form, counts) in {"seg_r1": boxed, "seg_r1_prerl": points_alone}.items():
        assert reward(preset, case(text=text)) == pytest.approx(form + counts)
    assert reward("seg_r1_as_released", case(text=text)) == pytest.approx(boxed[0] + 0.9 * boxed[1])


def test_an_answer_that_the_task_cannot_read_has_no_mask() -> None:
    assert reward("seg_r1", case(failed=True)) == reward("seg_r1_as_released", case(failed=True)) == 1.0


def test_hostile_texts_are_measured() -> None:
    for text in completions(100, seed=6):
        for tag, key in (("bbox", '"bbox_2d": '), ("points", '"point_2d": ')):
            text = text.replace(key, f"<{tag}>").replace("],", f"]</{tag}>,")
        one = case(text=text)
        values = [COMPONENTS[f"seg_r1_{name}"].measure(one) for name in ("format", "iou", "structure")]
        assert all(0 <= value <= 1 for value in values)
