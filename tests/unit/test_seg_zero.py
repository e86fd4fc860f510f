"""Guards Seg-Zero's rewards, strict and soft, against values worked out by hand from the published rules.

The truth is a square, 100..300 both ways with its point at (200, 200), in an image of 840 x 840. With both edge pixels
counted it has 201 x 201 pixels.
"""

from __future__ import annotations

import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception.grammar import braces
from reward_workers.components import Case
from tests import builders
from tests.builders import target
from tests.hostile_text import completions
from tests.presets import preset as preset_terms

TRUTH = target([(100, 100, 300, 300)], [(200, 200)])
TERMS = ("think_format", "seg_zero_format", "seg_zero_iou", "seg_zero_box", "seg_zero_points")
BOX, ONE, TWO = "[100, 100, 300, 300]", "[190, 200]", "[210, 200]"


def said(box: str = BOX, one: str = ONE, two: str = TWO) -> str:
    return f'<think>a</think><answer>{{"bbox": {box}, "points_1": {one}, "points_2": {two}}}</answer>'


def named(first: str, second: str, third: str) -> str:
    return f'<think>a</think><answer>{{"{first}": {BOX}, "{second}": {ONE}, "{third}": {TWO}}}</answer>'


def values(preset: str, case: Case) -> tuple[float, ...]:
    terms = preset_terms(preset)
    assert tuple(terms) == TERMS and {weight for weight, _ in terms.values()} == {1.0}
    return tuple(term(case) for _, term in terms.values())


WHOLE, NOTHING = (1, 1, 1, 1, 1), (1, 0, 0, 0, 0)
TABLE = [  # text, strict, soft (None: the same)
    (said(), WHOLE, None),
    ("", (0, 0, 0, 0, 0), None),
    (said().replace("</think>", "</think> so "), (0, 1, 1, 1, 1), None),
    (said().replace("</think>", "</think>\n \n"), WHOLE, None),
    (said().replace('"', "'"), NOTHING, None),  # the prompt's own example: no JSON
    ("look {here} " + said(), (0, 0, 0, 0, 0), None),  # the first braces count, and hold no JSON
    ("{} " + said(), (0, 1, 1, 1, 1), None),  # empty braces do not
    (said().replace("<answer>", "<answer>{" + '"bbox": [1, 2, 3, 4]}'), (1, 0, 0, 0, 0), None),
    (f'<think>{{"bbox": {BOX}, "points_1": {ONE}, "points_2": {TWO}}}</think><answer></answer>', WHOLE, None),
    # names
    (named("bbox", "points_1", "points_2"), WHOLE, None),
    (named("the_BBox", "Points_A", "points_b"), NOTHING, WHOLE),
    (named("bbox", "point_1", "point_2"), (1, 0, 1, 1, 0), (1, 1, 1, 1, 0)),
    (named("box", "points_1", "points_2"), NOTHING, None),
    (named("bbox_2d", "points_1", "points_2"), NOTHING, WHOLE),
    # kinds: only the soft format takes texts of the right length, and neither calculates with them
    (said(box='"1234"'), NOTHING, (1, 1, 0, 0, 0)),
    (said(one='"12"'), (1, 0, 1, 1, 0), (1, 1, 1, 1, 0)),
    (said(box="[100, 100, 300]"), NOTHING, None),
    (said(box="[100, null, 300, 300]"), (1, 1, 0, 0, 0), None),
    (said(one="[190, 200, 7]"), (1, 0, 1, 1, 1), None),  # the format is wrong, its first two values are right
    (said(one="7"), (1, 0, 1, 1, 0), None),
    (said(one="[NaN, 200]"), (1, 1, 1, 1, 0), None),
    # IoU: 201 x 101 of 201 x 201 pixels are 0.5025, one row less is 0.4975; both are far from 10 px on average
    (said(box="[100, 100, 300, 200]"), (1, 1, 1, 0, 1), None),
    (said(box="[100, 100, 300, 199]", one="[190, 180]", two="[210, 180]"), (1, 1, 0, 0, 1), None),
    (said(box="[300, 300, 100, 100]"), (1, 1, 0, 0, 0), None),
    # L1: 40 px in all are 10 on average, which is not below 10
    (said(box="[110, 110, 310, 310]"), (1, 1, 1, 0, 1), None),
    (said(box="[110, 110, 310, 309]"), (1, 1, 1, 1, 1), None),
    # points: on the box's edge is inside; fractions are cut off; 100 px on average is too far
    (said(box="[190, 100, 390, 300]"), (1, 1, 0, 0, 1), None),  # IoU 111/291
    (said(box="[191, 100, 391, 300]"), (1, 1, 0, 0, 0), None),
    (said(one="[300.9, 200]"), (1, 1, 1, 1, 1), None),
    (said(one="[301, 200]"), (1, 1, 1, 1, 0), None),
    (said(one="[100, 200]", two="[300, 200]"), (1, 1, 1, 1, 0), None),
    (said(one="[100, 200]", two="[299, 200]"), (1, 1, 1, 1, 1), None),
]


@pytest.mark.parametrize(("text", "strict", "soft"), TABLE)
def test_published_values(text: str, strict: tuple[float, ...], soft: tuple[float, ...] | None) -> None:
    case = builders.case(text, TRUTH, 840)
    assert values("seg_zero", case) == strict
    assert values("seg_zero_soft", case) == (soft or strict)


def test_boxes_that_touch_do_not_overlap() -> None:
    """Of an object a third of a pixel wide, the pixel that touches it is more than half when both edges count."""
    case = builders.case(said(box="[100.4, 100, 100.4, 300]"), target([(100, 100, 100.4, 300)], [(100, 200)]), 840)
    assert values("seg_zero", case)[2:4] == (0, 1)


def test_thresholds_hold_in_the_840_frame() -> None:
    """An image of 420 x 210 pixels, answered in a frame of 1000: the same square and points."""
    truth = target([(50, 25, 150, 75)], [(100, 50)])
    view = builders.view(0, 0, 420, 210, 1000, 1000)
    text = said(*(str([round(n / 0.84) for n in box]) for box in ([104, 104, 308, 308], [190, 200], [210, 200])))
    case = builders.case(text, truth, image=builders.Frame(210, 420), view=view)
    assert values("seg_zero", case) == WHOLE


@pytest.mark.parametrize("preset", ["seg_zero", "seg_zero_soft"])
def test_nothing_is_right_where_nothing_is_there(preset: str) -> None:
    assert values(preset, builders.case(said(), target(), 840)) == (1, 1, 0, 0, 0)


def test_hostile_texts_are_measured() -> None:
    warnings.simplefilter("error", RuntimeWarning)
    terms = preset_terms("seg_zero_soft")
    for text in completions(100, seed=5):
        text = text.replace("[{", "{").replace("bbox_2d", "bbox").replace('"point_2d"', '"points_1":[1,1], "points_2"')
        assert {term(builders.case(text, TRUTH, 840)) for _, term in terms.values()} <= {0.0, 1.0}


@settings(max_examples=100)
@given(st.text("{}a\n", max_size=8))
def test_braces_are_found_as_the_published_pattern_finds_them(text: str) -> None:
    found = re.search("{[^}]+}", text)
    assert braces(text) == (found and found[0])
