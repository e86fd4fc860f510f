"""The form of an ideal answer: what a supervised policy is shown, and what `perception.answers` reads back."""

from __future__ import annotations

import json
from collections.abc import Sequence

Box = tuple[int, int, int, int]
Point = tuple[int, int]

_ROWS = ("upper", "", "lower")
_COLUMNS = ("left", "", "right")


def whereabouts(point: Point, height: int, width: int) -> str:
    """The third of the image a point lies in, in words: 'upper left', 'middle', ..."""
    row = _ROWS[min(2, 3 * point[1] // height)]
    column = _COLUMNS[min(2, 3 * point[0] // width)]
    return " ".join(filter(None, (row, column))) or "middle"


def ideal_completion(boxes: Sequence[Box], points: Sequence[Point], height: int, width: int) -> str:
    """Dr. Seg's form (methods: think with look, then a JSON list), boxes and points in the (height, width) frame."""
    places = " and ".join(whereabouts(point, height, width) for point in points) or "nowhere"
    items = [{"bbox_2d": list(box), "point_2d": list(point)} for box, point in zip(boxes, points, strict=True)]
    answer = ", ".join(json.dumps(item).replace(", ", ",").replace(',"', ', "') for item in items)
    return f"<think><look>{places}</look></think><answer>[{answer}]</answer>"
