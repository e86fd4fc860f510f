"""Components about the answer's SAM2 mask and the true one, each the union of its objects' masks.

A completion without an answer is worth 0; one that rightly says that nothing is there is worth 1.
"""

import numpy as np

from perception import metrics
from reward_workers.components import Case, component


@component(needs={"masks"})
def mask_iou(case: Case) -> float:
    """Intersection over union. Its mean over held-out samples is gIoU."""
    return case.mask_iou if case.answered else 0.0


@component(needs={"masks"})
def mask_dice(case: Case) -> float:
    """Twice the intersection over the sum of the areas."""
    return case.mask_dice if case.answered else 0.0


@component(needs={"masks"})
def boundary_iou(case: Case, *, ratio: float = 0.02) -> float:
    """IoU of the outlines, `ratio` image diagonals wide (Cheng et al., CVPR 2021)."""
    return metrics.boundary_iou(*_masks(case), ratio) if case.answered else 0.0


@component(needs={"masks"})
def s_measure(case: Case, *, alpha: float = 0.5) -> float:
    """Likeness of structure (Fan et al., ICCV 2017), as Seg-R1 rewards it."""
    return metrics.s_measure(*_masks(case), alpha) if case.answered else 0.0


def _masks(case: Case) -> tuple[np.ndarray, np.ndarray]:
    assert case.masks is not None, "a component that needs masks is measured where they are compared"
    return case.masks()
