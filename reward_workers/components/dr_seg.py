"""Accuracy as Dr. Seg and VisionReasoner publish it (`dr_seg.py`, `vision_reasoner.py`): their list of objects, their
binary matching, their IoU with both edge pixels counted, their values for empty matches.

They differ from `boxes` in one more way: they are defined where there is no answer.
"""

from typing import Any, NamedTuple

import numpy as np

from perception import metrics
from perception.frames import view_arrays_to_image
from perception.matching import Matched, match, objects_in
from reward_workers.components import Case, component
from reward_workers.components.format import json_answer

MAX_OBJECTS = 120
"""Those beyond are not looked at, neither in the truth nor in the answer."""


@component(needs={"boxes", "points"})
def dr_seg_iou(case: Case) -> float:
    """x1: mean IoU of the pairs; 0 without any."""
    return metrics.matched_iou(case.once(_published), empty=0.0)


@component(needs={"boxes", "points"})
def dr_seg_count(case: Case) -> float:
    """x2: min(M, N) / max(M, N); 1 when both are 0."""
    return metrics.count_ratio(case.once(_published).answered, case.once(_published).true)


@component(needs={"boxes", "points"})
def dr_seg_points(case: Case) -> float:
    """x3: nearness of the matched points; 0 without any pair."""
    return metrics.point_score(case.once(_published), empty=0.0)


@component(needs={"boxes", "points"})
def vision_reasoner_accuracy(case: Case) -> float:
    """VisionReasoner's thresholded hits, 0..3; 0 where its arithmetic would raise, as on texts, nulls and booleans."""
    return metrics.vision_reasoner(case.once(_published)) if _has_arithmetic(*case.once(published_objects).raw) else 0.0


class PublishedObjects(NamedTuple):
    """Predictions as the published accuracy reward sees them, in the answer's own frame."""

    boxes: np.ndarray
    """(count, 4) float64; all NaN (which matches nothing) where the published arrays could not be built."""
    points: np.ndarray
    """(count, 2) float64, likewise."""
    raw: tuple[list[Any], list[Any]]
    """Boxes and points as they were written."""


def published_objects(case: Case) -> PublishedObjects:
    """The objects the published accuracy reward scores.

    Differs from the task's parser: one item without `bbox_2d` or `point_2d` empties the list, and one that is no pair
    of numeric lists leaves only the count. A null becomes NaN, as published; it matches nothing, where the published
    metric would turn NaN.
    """
    data = json_answer(case.text)
    try:
        pairs = [(item["bbox_2d"], item["point_2d"]) for item in data] if isinstance(data, list) else []
    except (TypeError, KeyError):
        pairs = []
    raw = [box for box, _ in pairs[:MAX_OBJECTS]], [point for _, point in pairs[:MAX_OBJECTS]]
    boxes, points = _numeric(raw[0], 4), _numeric(raw[1], 2)
    if boxes is None or points is None:
        boxes, points = np.full((len(raw[0]), 4), np.nan), np.full((len(raw[0]), 2), np.nan)
    return PublishedObjects(boxes=boxes, points=points, raw=raw)


def _published(case: Case) -> Matched:
    read = case.once(published_objects)
    with np.errstate(over="ignore", invalid="ignore"):  # a model may answer 1e308
        boxes, points = view_arrays_to_image(read.boxes, read.points, case.view)
        objects = objects_in(case.image, boxes, points)
    true = objects_in(case.image, case.target.boxes[:MAX_OBJECTS], case.target.points[:MAX_OBJECTS])
    return match(objects, true, "binary", pixel=1.0)


def _has_arithmetic(boxes: list[Any], points: list[Any]) -> bool:
    """Whether numpy can calculate with the arrays as they were written: booleans cannot be subtracted from each other,
    and a root cannot be taken of integers beyond 64 bits, which become objects."""
    try:
        box_array, point_array = np.array(boxes), np.array(points)
    except ValueError:  # rows of different lengths
        return False
    large = box_array.dtype.kind == "O" and all(isinstance(value, int | float) for value in box_array.flat)
    return (box_array.dtype.kind in "iuf" or large) and point_array.dtype.kind in "biuf"


def _numeric(rows: list[Any], width: int) -> np.ndarray | None:
    """(N, width) float64, or None."""
    try:
        array = np.array(rows, dtype=np.float64) if rows else np.empty((0, width))
    except (ValueError, TypeError, OverflowError):
        return None
    return array if array.shape == (len(rows), width) else None
