"""Seg-Zero's reward for one object, given by a box and two points in it; with `think_format` it adds up to 5.

Source: Seg-Zero before VisionReasoner, `seg.py` (soft: names by what they contain) and `seg_restrict.py` (`strict`, for
its recipes: lists under the very names `bbox`, `points_1` and `points_2`). The object is the first JSON in braces, even
in the thinking; thresholds hold in the 840x840 frame.

Where we differ: booleans, digits in quotes and what is not finite are no numbers, and a name is not box and point at
once. The truth has one point per object, with which both answered points are compared; there it has two, the centres of
the two largest circles in the object.
"""

from typing import Any

import numpy as np

from perception import matching
from perception.frames import view_arrays_to_image
from perception.grammar import braces, numbers
from reward_workers.components import Case, component
from reward_workers.components.format import json_or_none


@component()
def seg_zero_format(case: Case, *, strict: bool = True) -> float:
    """1 iff there are a box of 4 and two points of 2 values, of whatever kind."""
    box, points = _named(case, strict, "point")
    return float([isinstance(one, list if strict else list | str) and len(one) for one in (box, *points)] == [4, 2, 2])


@component(needs={"boxes"})
def seg_zero_iou(case: Case, *, strict: bool = True) -> float:
    """1 iff the IoU of the boxes, both edge pixels counted, exceeds 0.5 and they do more than touch."""
    box, true = _said(case, strict).boxes, matching.objects_of_target(case.target, case.image).boxes[:1]
    overlap = np.minimum(box[:, 2:], true[:, 2:]) > np.maximum(box[:, :2], true[:, :2])
    return float(overlap.all() and (matching.pairwise_iou(box, true, pixel=1.0) > matching.IOU_HIT).any())


@component(needs={"boxes"})
def seg_zero_box(case: Case, *, strict: bool = True) -> float:
    """1 iff the coordinates of the boxes differ by less than 10 px on average."""
    true = matching.objects_of_target(case.target, case.image).boxes[:1]
    return float((matching.pairwise_l1(_said(case, strict).boxes, true) < matching.L1_HIT).any())


@component(needs={"points"})
def seg_zero_points(case: Case, *, strict: bool = True) -> float:
    """1 iff both points, fractions cut off, lie in the answered box and less than 100 px from the truth on average."""
    said, true = _said(case, strict), matching.objects_of_target(case.target, case.image).points[:1]
    near = matching.pairwise_distance(said.points, true).mean(axis=0) < 100.0
    return float(matching.points_inside(said.points, said.boxes).all() and near.any())


def _named(case: Case, strict: bool, word: str) -> tuple[Any, list[Any]]:
    """What was written as box, and as points: up to two. `word`: what a point's name contains, unless `strict`."""
    data: dict[str, Any] = json_or_none(braces(case.text)) or {}
    if strict:
        return data.get("bbox"), [data[name] for name in ("points_1", "points_2") if name in data]
    box = next((name for name in data if "bbox" in name.lower()), None)
    points = [value for name, value in data.items() if word in name.lower() and name != box]
    return data[box] if box else None, points[:2]


def _said(case: Case, strict: bool) -> matching.Objects:
    """A box (1, 4) and two points (2, 2) in the metric frame; NaN where they were not given."""
    box, points = _named(case, strict, "points")
    both = [numbers(point[:2], 2) if isinstance(point, list) else None for point in points]
    pair = np.trunc(np.array([point or [np.nan] * 2 for point in (*both, None, None)[:2]]))
    boxes, pair = view_arrays_to_image(np.array([numbers(box, 4) or [np.nan] * 4]), pair, case.view)
    return matching.objects_in(case.image, boxes, pair)
