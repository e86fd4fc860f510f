"""Seg-R1's reward of an answer in tags, up to 2: its form, and 0.7 IoU + 0.3 structure measure of SAM2's mask.

    <think>...</think> <bbox>[x1,y1,x2,y2]</bbox>, <points>[[x,y],[x,y]]</points>, <labels>[1,0]</labels>

Source: `grpo.py` and, without thinking and `boxes`, `grpo_prerl.py`. Masks count only with as many labels as points,
and with a box. Where we differ: masks are compared at the original size (there at 768 x 768), and a list that Python
cannot read is passed over (there it spoils the whole answer).
"""

from perception import metrics
from perception.grammar import lists, numbers, section
from reward_workers.components import Case, component
from reward_workers.components.masks import mask_iou, of_masks


@component()
def seg_r1_format(case: Case, *, boxes: bool = True) -> float:
    """1 iff points, labels, a box and a think block, perhaps empty, are there; without `boxes` points and labels do."""
    return float(_prompts(case.text, boxes) and (not boxes or section(case.text, "think") is not None))


@component(needs={"masks"})
def seg_r1_iou(case: Case, *, boxes: bool = True) -> float:
    """Intersection over union of the masks."""
    return mask_iou(case) if _prompts(case.text, boxes) else 0.0


@component(needs={"masks"})
def seg_r1_structure(case: Case, *, boxes: bool = True, emptied_truth: bool = False) -> float:
    """Structure measure of the masks (alpha 0.5).

    `emptied_truth`: as released. A second threshold (`gt > 128` of 0 and 1) empties the true mask, and what is rewarded
    is 1 - the share of the image that was answered: any speck scores better than the object.
    """
    metric = (lambda answered, _: 1 - float(answered.mean())) if emptied_truth else metrics.s_measure
    return of_masks(case, metric) if _prompts(case.text, boxes) else 0.0


def _prompts(text: str, boxes: bool) -> bool:
    """Whether the text holds as many labels as points, and a box where `boxes` are asked for."""
    points, labels = (next(lists(text, tag), []) for tag in ("points", "labels"))
    whole = all(numbers(point, 2) for point in points) and all(isinstance(label, int) for label in labels)
    boxed = not boxes or any(numbers(box, 4) for box in lists(text, "bbox"))
    return boxed and whole and 0 < len(points) == len(labels)
