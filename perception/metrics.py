"""What an answer is worth: pure functions, 0..1 unless said otherwise, always finite.

No-target questions are defined everywhere: nothing answered where nothing is there is 1, one-sided emptiness is 0. The
published systems differ in x1 and x3, where an empty match is worth 0: pass `empty=0`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from perception import masks
from perception.matching import IOU_HIT, L1_HIT, POINT_HIT, Matched
from perception.types import Rle

_NEAR, _FAR = 30.0, 200.0  # pixels of the metric frame


def matched_iou(matched: Matched, empty: float = 1.0) -> float:
    """Mean IoU over the matched pairs (Dr. Seg's x1). Missing and surplus objects are left to `count_ratio`."""
    return _mean(matched.iou, matched, empty)


def count_ratio(matched: Matched) -> float:
    """min(M, N) / max(M, N); 1 when both are 0 (Dr. Seg's x2, Perception-R1's counting)."""
    largest = max(matched.answered, matched.true)
    return min(matched.answered, matched.true) / largest if largest else 1.0


def point_score(matched: Matched, empty: float = 1.0) -> float:
    """Mean over the pairs of 1 up to 30 px, 0 from 200 px, linear between (Dr. Seg's x3)."""
    return _mean(np.clip((_FAR - matched.distance) / (_FAR - _NEAR), 0, 1), matched, empty)


def vision_reasoner(matched: Matched) -> float:
    """VisionReasoner's accuracy, 0..3: hits of IoU, L1 and point summed over the pairs, divided by max(M, N).

    0 where either side is empty, as published. The pairs should come from the binary cost.
    """
    if not len(matched.iou):
        return 0.0
    point_hit = (matched.distance < POINT_HIT) & matched.point_inside
    hits = (matched.iou > IOU_HIT).sum() + (matched.l1 < L1_HIT).sum() + point_hit.sum()
    return float(hits / max(matched.answered, matched.true))


def count_exact(matched: Matched) -> float:
    """1 iff as many objects were answered as there are."""
    return float(matched.answered == matched.true)


def box_iou(answered: np.ndarray, true: np.ndarray) -> float:
    """IoU of the areas covered by two sets of boxes, (M, 4) and (N, 4) in one frame; rows of NaN cover nothing.

    Exact: the plane is cut at every edge. For one box on each side it is their IoU.
    """
    boxes = np.concatenate([answered, true]).astype(np.float64)
    belongs = np.arange(len(boxes)) < len(answered)
    solid = (boxes[:, 2:] > boxes[:, :2]).all(-1)
    boxes, belongs = boxes[solid], belongs[solid]
    xs, ys = np.unique(boxes[:, 0::2]), np.unique(boxes[:, 1::2])
    covered = np.zeros((2, max(0, len(ys) - 1), max(0, len(xs) - 1)), bool)
    columns, rows = np.searchsorted(xs, boxes[:, 0::2]), np.searchsorted(ys, boxes[:, 1::2])
    for side, (left, right), (top, bottom) in zip(belongs.astype(int), columns, rows, strict=True):
        covered[side, top:bottom, left:right] = True
    cells = np.diff(ys)[:, None] * np.diff(xs)[None]
    return _ratio(float(cells[covered.all(0)].sum()), float(cells[covered.any(0)].sum()))


def mask_iou(answered: Rle, true: Rle) -> float:
    """Intersection over union; 1 when both masks are empty. Raises ValueError when the sizes differ."""
    return _ratio(*masks.intersection_and_union(answered, true))


def mask_dice(answered: Rle, true: Rle) -> float:
    """2 |A and B| / (|A| + |B|); 1 when both masks are empty. Raises ValueError when the sizes differ."""
    both, either = masks.intersection_and_union(answered, true)
    return _ratio(2 * both, both + either)


def giou(ious: Sequence[float]) -> float:
    """Mean of the per-sample IoU, the field's gIoU (not the generalised IoU of boxes). A failed sample counts as 0."""
    if not ious:
        raise ValueError("gIoU of no sample is not defined")
    return float(np.mean(ious))


def ciou(intersections_and_unions: Sequence[tuple[int, int]]) -> float:
    """Sum of the intersections over the sum of the unions, over all samples; 1 when every union is empty."""
    if not intersections_and_unions:
        raise ValueError("cIoU of no sample is not defined")
    both, either = np.asarray(intersections_and_unions, np.int64).sum(0).tolist()
    return _ratio(both, either)


def _mean(values: np.ndarray, matched: Matched, empty: float) -> float:
    if len(values):
        return float(values.mean())
    return empty if matched.answered == matched.true == 0 else 0.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0
