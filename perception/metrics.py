"""Metrics of matched objects, boxes and masks: pure functions, always finite, 0..1 unless their docstring differs.

No-target questions are defined everywhere: nothing answered where nothing is there is 1, one-sided emptiness is 0. The
published systems differ in x1 and x3, where an empty match is worth 0: pass `empty=0`. `s_measure` keeps the values its
paper gives to empty masks.
"""

import math

import cv2
import numpy as np

from perception.matching import Matched

_NEAR, _FAR = 30.0, 200.0  # pixels of the metric frame


def matched_iou(matched: Matched, empty: float = 1.0) -> float:
    """Mean IoU over the matched pairs (Dr. Seg's x1). Missing and surplus objects are left to `count_ratio`."""
    return _mean(matched.iou, matched, empty)


def count_ratio(answered: int, true: int) -> float:
    """min / max; 1 when both are 0 (Dr. Seg's x2, Perception-R1's counting)."""
    return min(answered, true) / max(answered, true) if max(answered, true) else 1.0


def point_score(matched: Matched, empty: float = 1.0) -> float:
    """Mean over the pairs of 1 up to 30 px, 0 from 200 px, linear between (Dr. Seg's x3)."""
    return _mean(np.clip((_FAR - matched.distance) / (_FAR - _NEAR), 0, 1), matched, empty)


def vision_reasoner(matched: Matched) -> float:
    """VisionReasoner's accuracy, 0..3: hits of IoU, L1 and point summed over the pairs, divided by max(M, N).

    0 where either side is empty, as published. The pairs should come from the binary cost.
    """
    return float(matched.hits.sum() / max(matched.answered, matched.true, 1))


def box_iou(answered: np.ndarray, true: np.ndarray) -> float:
    """IoU of the areas covered by two sets of boxes, (M, 4) and (N, 4) in one frame; rows of NaN cover nothing.

    Exact: the plane is cut at every edge. For one box on each side it is their IoU.
    """
    boxes = np.concatenate([answered, true]).astype(np.float64)
    belongs = np.arange(len(boxes)) < len(answered)
    solid = (boxes[:, 2:] > boxes[:, :2]).all(-1)
    boxes, belongs = boxes[solid], belongs[solid]
    if belongs.all() or not belongs.any():
        return float(not len(boxes))
    xs, ys = np.unique(boxes[:, 0::2]), np.unique(boxes[:, 1::2])
    covered = np.zeros((2, len(ys) - 1, len(xs) - 1), bool)
    columns, rows = np.searchsorted(xs, boxes[:, 0::2]), np.searchsorted(ys, boxes[:, 1::2])
    for side, (left, right), (top, bottom) in zip(belongs.astype(int), columns, rows, strict=True):
        covered[side, top:bottom, left:right] = True
    cells = np.diff(ys)[:, None] * np.diff(xs)[None]
    return _ratio(float(cells[covered.all(0)].sum()), float(cells[covered.any(0)].sum()))


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements that make one text the other (Levenshtein), in linear memory."""
    short, long = sorted((a, b), key=len)
    letters, steps = np.array([*map(ord, long)], np.int64), np.arange(len(long) + 1)
    row = steps
    for letter in map(ord, short):
        row = np.concatenate([row[:1] + 1, np.minimum(row[1:] + 1, row[:-1] + (letters != letter))])
        row = np.minimum.accumulate(row - steps) + steps  # insertions from the left
    return int(row[-1])


def boundary_iou(answered: np.ndarray, true: np.ndarray, ratio: float = 0.02) -> float:
    """IoU of the inner boundaries of two (H, W) bool masks (Cheng et al., CVPR 2021).

    A boundary is the mask without its erosion by a square of radius `ratio` diagonals, at least 1 pixel; what lies
    beyond the image counts as outside the mask. 1 when both masks are empty, 0 when one is. Raises ValueError when the
    sizes differ.
    """
    _same_size(answered, true)
    width = max(1, round(ratio * math.hypot(*true.shape)))
    a, b = _boundary(answered, width), _boundary(true, width)
    return _ratio(_pixels(a & b), _pixels(a | b))


def s_measure(answered: np.ndarray, true: np.ndarray, alpha: float = 0.5) -> float:
    """Structure measure of two (H, W) bool masks (Fan et al., ICCV 2017), as Seg-R1 rewards it.

    `alpha` weighs the likeness of object and background as wholes, 1 - `alpha` that of the four parts around the
    target's centroid. As published: without any target 1 - the share of the image answered, hence 1 when both masks are
    empty; with a target everywhere the share answered; and an empty answer keeps what the true background is worth.
    Equal to pysodmetrics 1.6.2 within 1e-15 on 6,000 random masks of 3 to 120 pixels a side once its epsilon in the
    denominators is taken out, by which a perfect answer to a tiny target falls below 1 (by up to 5e-8 there), and save
    its NaN where the centroid lies in the last row or column. Raises ValueError when the sizes differ.
    """
    _same_size(answered, true)
    target = _pixels(true)
    if target in (0, true.size):
        return float((answered == true).mean())
    hits, rest = _pixels(answered & true), true.size - target
    clear = rest - _pixels(answered) + hits
    whole = (target * _evenness(hits, target) + rest * _evenness(clear, rest)) / true.size
    return max(0.0, alpha * whole + (1 - alpha) * _likeness_of_parts(answered, true))


def _mean(values: np.ndarray, matched: Matched, empty: float) -> float:
    if len(values):
        return float(values.mean())
    return empty if matched.answered == matched.true == 0 else 0.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _same_size(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise ValueError(f"masks of different sizes: {a.shape} and {b.shape}")


def _pixels(mask: np.ndarray) -> int:
    """Pixels set, as an integer that does not overflow when four of them are multiplied."""
    return int(np.count_nonzero(mask))


def _boundary(mask: np.ndarray, width: int) -> np.ndarray:
    square, border = np.ones((3, 3), np.uint8), cv2.BORDER_CONSTANT
    inner = cv2.erode(mask.astype(np.uint8), square, iterations=width, borderType=border, borderValue=(0,))
    return mask & (inner == 0)


def _evenness(right: int, pixels: int) -> float:
    """Fan's object score of a region of which `right` pixels agree: 1 when all do, 0 when none does."""
    share = right / pixels
    deviation = math.sqrt(share * (1 - share) * pixels / max(1, pixels - 1))
    return 2 * share / (share * share + 1 + deviation)


def _likeness_of_parts(answered: np.ndarray, true: np.ndarray) -> float:
    """SSIM of the four parts that meet at the target's centroid, weighed by their sizes."""
    target = _pixels(true)
    row, column = (round(int(true.sum(1 - axis) @ np.arange(true.shape[axis])) / target) + 1 for axis in (0, 1))
    parts = [(rows, columns) for rows in (np.s_[:row], np.s_[row:]) for columns in (np.s_[:column], np.s_[column:])]
    return sum(true[part].size * _ssim(answered[part], true[part]) for part in parts) / true.size


def _ssim(answered: np.ndarray, true: np.ndarray) -> float:
    """Structural similarity from counts alone: of 0/1 values they give every mean and variance."""
    n, a, t = true.size, _pixels(answered), _pixels(true)
    structure = 4 * a * t * (n * _pixels(answered & true) - a * t)
    contrast = (a * a + t * t) * (a * (n - a) + t * (n - t))
    return structure / contrast if contrast else 1.0
