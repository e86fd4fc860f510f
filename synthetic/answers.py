"""Ideal answers, in the grammar that segment, ground and count share (`perception.tasks.objects`)."""

import json
from collections.abc import Sequence

import numpy as np

from perception.frames import Frame
from perception.types import Target

_ROWS = ("upper", "", "lower")
_COLUMNS = ("left", "", "right")


def write(target: Target, frame: Frame, inline: bool = False) -> str:
    """The ideal completion about a target that is measured in `frame`: a think block that says where, and the list;
    boxes and points in whole pixels inside the frame.

    `inline`: with the `<look>` blocks that `look=inline` asks for.
    """
    limit = np.array([frame.width, frame.height])
    boxes = np.rint(target.boxes.reshape(-1, 4)).clip(0, np.tile(limit, 2)).astype(int).tolist()
    points = np.rint(target.points.reshape(-1, 2)).clip(0, limit - 1).astype(int).tolist()
    places = " and ".join(whereabouts(point, frame) for point in points) or "nowhere"
    items = [{"bbox_2d": box, "point_2d": point} for box, point in zip(boxes, points, strict=True)]
    answer = ", ".join(json.dumps(item).replace(", ", ",").replace(',"', ', "') for item in items)
    think = f"<look>{places}</look>" if inline else places
    return f"<think>{think}</think><answer>[{answer}]</answer>"


def whereabouts(point: Sequence[int], frame: Frame) -> str:
    """The third of the frame a point lies in, in words: 'upper left', 'middle', ..."""
    row = _ROWS[min(2, int(3 * point[1] // frame.height))]
    column = _COLUMNS[min(2, int(3 * point[0] // frame.width))]
    return " ".join(filter(None, (row, column))) or "middle"
