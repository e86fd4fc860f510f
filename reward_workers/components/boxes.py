"""Components about boxes and points, matched by the continuous cost, and about how many there are.

A completion without an answer is worth 0.
"""

from collections.abc import Sequence

import numpy as np

from perception import metrics
from perception.matching import objects_of_answer, objects_of_target, pairwise_iou
from perception.types import AnswerObject, Target
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


@component(needs={"boxes"})
def box_soft_f1(case: Case) -> float:
    """Harmonic mean of precision and recall: means over the answered and the true boxes of their best IoU with one of
    the same label, if the truth has labels (Rex-Omni's `box_iou`). Of neither any, the empty list alone is 1."""
    if not (case.answer.objects and len(case.target.boxes)):
        return float(case.answered and not case.answer.objects and not case.target.count)
    both = objects_of_answer(case.answer, case.image).boxes, objects_of_target(case.target, case.image).boxes
    iou = pairwise_iou(*both) * same_labels(case.answer.objects, case.target)
    precision, recall = iou.max(axis=1).mean(), iou.max(axis=0).mean()
    return float(2 * precision * recall / (precision + recall)) if precision else 0.0


@component(needs={"count"})
def detect_or_abstain(case: Case) -> float:
    """-1..1: 1 for objects where there are some and for the empty list where there are none, -1 the other way round, 0
    without an answer (CFCamo's decision, arXiv 2606.11231; with `mask_iou` it adds up to its reward of one image)."""
    return float(case.answered and (1 if bool(case.answer.objects) == bool(case.target.count) else -1))


def same_labels(answered: Sequence[AnswerObject], target: Target) -> np.ndarray:
    """(M, N) bool of at least one object answered; where the truth has no labels all are the same."""
    true = target.labels or [None] * len(target.boxes)
    return np.array([[label in (None, one.label) for label in true] for one in answered], bool)
