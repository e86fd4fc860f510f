"""Guards VisionReasoner's accuracy against its published code on completions whose numbers are none, or only just.

Every expected value is what the published `vision_reasoner_accuracy_reward` (dvlab-research/Seg-Zero,
`verl/utils/reward_score/vision_reasoner.py`) returned for the completion, the truth being the squares A and B.
"""

from __future__ import annotations

import pytest

from reward_workers.components import COMPONENTS
from tests.builders import case, target

TRUTH = target([(100, 100, 199, 199), (400, 400, 499, 499)], [(150, 150), (450, 450)])
A = '{"bbox_2d": [100, 100, 199, 199], "point_2d": [150, 150]}'
B = '{"bbox_2d": [400, 400, 499, 499], "point_2d": [450, 450]}'


def item(box: str = "[100, 100, 199, 199]", point: str = "[150, 150]") -> str:
    return f'{{"bbox_2d": {box}, "point_2d": {point}}}'


def accuracy(*items: str) -> float:
    text = f"<think>a</think><answer>[{', '.join(items)}]</answer>"
    return COMPONENTS["vision_reasoner_accuracy"].measure(case(text, TRUTH, side=840))


@pytest.mark.parametrize(
    ("items", "published"),
    [
        ((A, B), 3.0),
        ((B, A), 3.0),
        ((A,), 1.5),
        ((A, B, A), 2.0),
        ((A,) * 121, 0.025),
        ((), 0.0),
        # strings: numpy makes the whole array text, and its arithmetic raises
        ((item('["100", "100", "199", "199"]'),), 0.0),
        ((item('["100", "100", "199", "199"]'), B), 0.0),
        ((item('["100", 100, 199, 199]'), B), 0.0),
        ((item(point='["150", "150"]'),), 0.0),
        ((item(point='["150", 150]'), B), 0.0),
        ((item('"100 100 199 199"'),), 0.0),
        # null: an array of objects, whose arithmetic raises
        ((item("[null, 100, 199, 199]"), B), 0.0),
        ((item("null"), B), 0.0),
        ((item(point="[null, 150]"), B), 0.0),
        ((item(point="[null, null]"),), 0.0),
        ((item('["100", null, 199, 199]'),), 0.0),
        # booleans: an array of nothing else cannot be subtracted from itself; among numbers they are 0 and 1
        ((item("[false, false, true, true]"),), 0.0),
        ((item("[false, false, true, true]"),) * 2, 0.0),
        ((item("[false, false, true, true]"), B), 1.5),
        ((item("[100, true, 199, 199]"), B), 2.5),
        ((item(point="[true, false]"),), 1.0),
        ((item(point="[true, false]"), item("[400, 400, 499, 499]", "[true, true]")), 2.0),
        ((item(point="[150, true]"), B), 2.5),
        # what is no number of this size
        ((item("[NaN, 100, 199, 199]"), B), 1.5),
        ((item(point="[NaN, 150]"), B), 2.5),
        ((item("[100, 100, Infinity, 199]"), B), 2.0),
        ((item("[100, 100, 1e999, 199]"), B), 2.0),
        ((item(f"[100, 100, 1{'0' * 400}, 199]"), B), 0.0),
        # rows of the wrong length
        ((item("[100, 100, 199]"), B), 0.0),
        ((item("[100, 100, 199, 199, 5]"),), 0.0),
        ((item(point="[150]"),), 0.0),
        ((item("[[100, 100], [199, 199]]"),), 0.0),
        # ties: no hit at exactly 10 px, 30 px and IoU 1/2; a point on its box's edge is inside
        ((item("[110, 110, 209, 209]"), B), 2.5),
        ((item("[110, 110, 209, 208.9]"), B), 3.0),
        ((item(point="[180, 150]"), B), 2.5),
        ((item(point="[179.9, 150]"), B), 3.0),
        ((item("[100, 100, 199, 149]", "[150, 120]"), B), 1.5),
        ((item("[100, 100, 160, 199]", "[160, 150]"), B), 3.0),
        ((item("[100, 100, 160, 199]", "[160.1, 150]"), B), 2.5),
        ((item("[100, 100, 199, 160]", "[150, 160]"), B), 3.0),
        ((item("[199, 199, 100, 100]"), B), 1.5),
        ((item("[100, 100, 99999999999999999999999, 199]"), B), 2.0),  # beyond 64 bits: numpy keeps Python's integers
    ],
)
def test_the_published_value(items: tuple[str, ...], published: float) -> None:
    assert accuracy(*items) == pytest.approx(published)
