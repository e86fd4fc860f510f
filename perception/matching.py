"""Hungarian matching of answered and true objects by pairwise measures of their boxes and points.

Boxes are (N, 4) x1 y1 x2 y2, points (N, 2) x y, both in the 840x840 metric frame (`frames.METRIC`) in which the
published thresholds are stated. What is no proper box or point has these values, always finite in the cost:
  NaN (none given)      IoU 0, L1 and distance infinite, no point inside
  infinite, or so large that an area is not finite
                        IoU 0, L1 and distance as they come, infinite at worst
  no area, or inverted  IoU 0, also with itself; with `pixel` = 1 a box without area is one pixel wide, as published
  outside the image     measured like any other; nothing is clipped
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from perception.frames import METRIC, Frame, convert_boxes, convert_points
from perception.types import Answer, Target

Cost = Literal["binary", "continuous"]

IOU_HIT = 0.5
L1_HIT = 10.0  # pixels
POINT_HIT = 30.0  # pixels
_DIAGONAL = float(np.hypot(METRIC.height, METRIC.width))


@dataclass(frozen=True, slots=True, kw_only=True)
class Objects:
    """Boxes and points of N objects, in the metric frame."""

    boxes: np.ndarray
    points: np.ndarray

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """The K = min(M, N) matched pairs of M answered and N true objects. Arrays are (K,), ordered by answered object."""

    answered: int
    true: int
    rows: np.ndarray
    """Index of the answered object."""
    columns: np.ndarray
    """Index of the true object."""
    iou: np.ndarray
    distance: np.ndarray
    """Between the points, pixels."""
    hits: np.ndarray
    """How many of the published criteria the pair meets, 0..3: IoU, L1, point (see `match`)."""


def objects_of_answer(answer: Answer, frame: Frame) -> Objects:
    """An answer given in `frame`; NaN for a missing box or point."""
    boxes = np.array([item.box or (np.nan,) * 4 for item in answer.objects]).reshape(-1, 4)
    points = np.array([item.point or (np.nan,) * 2 for item in answer.objects]).reshape(-1, 2)
    return objects_in(frame, boxes, points)


def objects_of_target(target: Target, frame: Frame) -> Objects:
    """The truth about an image of size `frame`."""
    return objects_in(frame, target.boxes, target.points)


def objects_in(frame: Frame, boxes: np.ndarray, points: np.ndarray) -> Objects:
    """Boxes (N, 4) and points (N, 2) measured in `frame`."""
    return Objects(boxes=convert_boxes(boxes, frame, METRIC), points=convert_points(points, frame, METRIC))


def match(answered: Objects, true: Objects, cost: Cost, pixel: float = 0.0) -> Matched:
    """Pair M answered with N true objects at the least total cost (`scipy.optimize.linear_sum_assignment`).

    binary      3 - ([IoU > 0.5] + [L1 < 10] + [distance < 30 and the point in its own box]): Dr. Seg, VisionReasoner.
                Pairs that miss all three are paired arbitrarily.
    continuous  (1 - IoU) + min(1, L1 / 840) + min(1, distance / diagonal): ours, so that near misses find each other.
    `pixel` is 1 for the published IoU, which counts both edge pixels as inside.
    """
    iou = pairwise_iou(answered.boxes, true.boxes, pixel)
    l1 = pairwise_l1(answered.boxes, true.boxes)
    distance = pairwise_distance(answered.points, true.points)
    point_hit = (distance < POINT_HIT) & points_inside(answered.points, answered.boxes)[:, None]
    hits = (iou > IOU_HIT).astype(int) + (l1 < L1_HIT) + point_hit
    if cost == "binary":
        total = 3.0 - hits
    else:
        total = (1 - iou) + np.minimum(1, l1 / METRIC.width) + np.minimum(1, distance / _DIAGONAL)
    rows, columns = linear_sum_assignment(total)
    pairs = {"iou": iou[rows, columns], "distance": distance[rows, columns], "hits": hits[rows, columns]}
    return Matched(answered=len(answered), true=len(true), rows=rows, columns=columns, **pairs)


def pairwise_iou(a: np.ndarray, b: np.ndarray, pixel: float = 0.0) -> np.ndarray:
    """(M, 4), (N, 4) -> (M, N) intersection over union; `pixel` is added to every side. 0 where it is not defined."""
    with np.errstate(over="ignore", invalid="ignore"):  # a model may answer 1e300
        top_left = np.maximum(a[:, None, :2], b[None, :, :2])
        bottom_right = np.minimum(a[:, None, 2:], b[None, :, 2:])
        sides = np.maximum(0, bottom_right - top_left + pixel)
        both = sides[..., 0] * sides[..., 1]
        either = _areas(a, pixel)[:, None] + _areas(b, pixel)[None] - both
        return np.divide(both, either, out=np.zeros_like(both), where=either > 0)


def pairwise_giou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(M, 4), (N, 4) -> (M, N) IoU less the share of the hull that neither covers, -1..1 (Rezatofighi, CVPR 2019)."""
    iou = pairwise_iou(a, b)
    hull = (np.maximum(a[:, None, 2:], b[None, :, 2:]) - np.minimum(a[:, None, :2], b[None, :, :2])).prod(-1)
    union = (_areas(a, 0.0)[:, None] + _areas(b, 0.0)[None]) / (1 + iou)
    return iou - 1 + np.divide(union, hull, out=np.ones_like(iou), where=hull > 0)


def _areas(boxes: np.ndarray, pixel: float) -> np.ndarray:
    sides = boxes[:, 2:] - boxes[:, :2] + pixel
    return np.asarray(sides[:, 0] * sides[:, 1])


def pairwise_l1(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(M, 4), (N, 4) -> (M, N) mean absolute difference of the coordinates; infinite for NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        return _far_if_nan(np.abs(a[:, None] - b[None]).sum(-1) / 4)


def pairwise_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(M, 2), (N, 2) -> (M, N) Euclidean distance; infinite for NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        return _far_if_nan(np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1)))


def _far_if_nan(distances: np.ndarray) -> np.ndarray:
    distances[np.isnan(distances)] = np.inf
    return distances


def points_inside(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(N, 2), (N, 4) -> (N,) bool: each point within its own box, edges included."""
    return np.asarray(((points >= boxes[:, :2]) & (points <= boxes[:, 2:])).all(-1))
