"""Components about boxes and points, matched by the continuous cost, and about how many there are.

A completion without an answer is worth 0.
"""

import numpy as np

from perception import metrics
from perception.matching import pairwise_iou
from reward_workers.components import Case, component


@component(needs={"boxes"})
def matched_iou(case: Case) -> float:
    """Mean box IoU of the matched pairs; 1 where nothing is there and nothing was answered."""
    return metrics.matched_iou(case.matched) if case.answered else 0.0


@component(needs={"points"})
def point_score(case: Case) -> float:
    """Nearness of the matched points: 1 up to 30 px of the 840 px frame, 0 from 200 px, linear between."""
    return metrics.point_score(case.matched) if case.answered else 0.0


@component(needs={"boxes"})
def box_iou(case: Case) -> float:
    """IoU of the areas covered by all answered and by all true boxes. Of neither any, the empty list alone is 1."""
    if not case.answered or (case.answer.objects and not len(case.target.boxes)):
        return 0.0
    answered = np.array([one.box for one in case.answer.objects if one.box]).reshape(-1, 4)
    return metrics.box_iou(answered, case.target.boxes)


@component(needs={"boxes"})
def first_box_iou(case: Case, *, power: float = 1.0) -> float:
    """IoU of the first answered and the first true box, to a `power`: 2 is Perception-R1's and LENS's reward."""
    boxes = np.array([one.box for one in case.answer.objects[:1] if one.box]).reshape(-1, 4)
    return float(pairwise_iou(boxes, case.target.boxes[:1]).sum() ** power)


@component(needs={"boxes"})
def box_accuracy(case: Case, *, threshold: float = 0.5) -> float:
    """1 iff `box_iou` exceeds the threshold: Acc@0.5 of referring expression comprehension."""
    return float(box_iou(case) > threshold)


@component(needs={"boxes", "labels"})
def detection_f1(case: Case, *, threshold: float = 0.5) -> float:
    """F1 of the answered objects; right is one whose label and, above the threshold, box are those of its true object.
    1 where nothing is there and nothing was answered."""
    pairs = case.matched
    named = np.array([one.label for one in case.answer.objects], object)[pairs.rows]
    true = np.array(case.target.labels or [None] * pairs.true, object)[pairs.columns]
    right, total = np.sum((pairs.iou > threshold) & (named == true)), pairs.answered + pairs.true
    return float(2 * right / total if total else case.answered)


@component(needs={"count"})
def count_exact(case: Case) -> float:
    """1 iff as many objects were answered as there are."""
    return float(case.answered and len(case.answer.objects) == case.target.count)


@component(needs={"count"})
def count_ratio(case: Case) -> float:
    """min / max of the answered and the true count; 1 when both are 0 (Dr. Seg's x2, Perception-R1's counting)."""
    return metrics.count_ratio(len(case.answer.objects), case.target.count) if case.answered else 0.0
