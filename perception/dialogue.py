"""The form of an ideal answer: what a supervised policy is shown, and what `perception.answers` reads back."""

from __future__ import annotations

import json
from collections.abc import Sequence

Numbers = Sequence[int]

_ROWS = ("upper", "", "lower")
_COLUMNS = ("left", "", "right")


def whereabouts(point: Numbers, height: int, width: int) -> str:
    """The third of the image a point lies in, in words: 'upper left', 'middle', ..."""
    row = _ROWS[min(2, 3 * point[1] // height)]
    column = _COLUMNS[min(2, 3 * point[0] // width)]
    return " ".join(filter(None, (row, column))) or "middle"


def ideal_completion(
    boxes: Sequence[Numbers], points: Sequence[Numbers], height: int, width: int, inline: bool = False
) -> str:
    """A think block and a JSON list, boxes and points in the (height, width) frame; `inline`: with Dr. Seg's look."""
    places = " and ".join(whereabouts(point, height, width) for point in points) or "nowhere"
    items = [{"bbox_2d": list(box), "point_2d": list(point)} for box, point in zip(boxes, points, strict=True)]
    answer = ", ".join(json.dumps(item).replace(", ", ",").replace(',"', ', "') for item in items)
    think = f"<look>{places}</look>" if inline else places
    return f"<think>{think}</think><answer>[{answer}]</answer>"
