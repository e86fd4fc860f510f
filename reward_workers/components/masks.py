"""Components about the answer's SAM2 mask and the true one, each the union of its objects' masks.

A completion without an answer is worth 0, and so is one whose objects have no pixel where nothing is there; one that
rightly says that nothing is there is worth 1.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from perception import metrics
from reward_workers.components import Case, component


@component(needs={"masks"})
def mask_iou(case: Case, *, power: float = 1.0) -> float:
    """Intersection over union, to a `power` (LENS: 2). Its mean over held-out samples is gIoU."""
    return case.mask_iou**power if case.answered else 0.0


@component(needs={"masks"})
def mask_dice(case: Case) -> float:
    """Twice the intersection over the sum of the areas."""
    return case.mask_dice if case.answered else 0.0


@component(needs={"masks"})
def boundary_iou(case: Case, *, ratio: float = 0.02) -> float:
    """IoU of the outlines, `ratio` image diagonals wide (Cheng et al., CVPR 2021)."""
    return of_masks(case, partial(metrics.boundary_iou, ratio=ratio))


@component(needs={"masks"})
def s_measure(case: Case, *, alpha: float = 0.5) -> float:
    """Likeness of structure (Fan et al., ICCV 2017), as Seg-R1 rewards it."""
    return of_masks(case, partial(metrics.s_measure, alpha=alpha))


def of_masks(case: Case, metric: Callable[[np.ndarray, np.ndarray], float]) -> float:
    """The metric of the answered and of the true mask, and the module's rule where there is no answer or no pixel."""
    if not case.answered:
        return 0.0
    assert case.masks is not None, "a component that needs masks is measured where they are compared"
    answered, true = case.masks()
    return metric(answered, true) if answered.any() or true.any() or not case.answer.objects else 0.0
