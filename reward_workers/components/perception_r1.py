"""Perception-R1's rewards. Grounding is `perception_r1_format` and the square of `first_box_iou`.

Source: linkangheng/PR1 (grounding) and its later version with counting and detection (`rewards.py`, `utils.py`). OCR
was not released there, and is MMR1's, of the same author (`perpo_ocr_edit_distance_reward`). Each component is the
corrected form; `released` gives the released one, and its docstring says how that differs. The end of the turn, with
which the published patterns end, is no part of a text here.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from perception import matching, metrics
from perception.frames import Frame, convert_points
from perception.grammar import section, unfenced
from reward_workers.components import Case, component
from reward_workers.components.boxes import same_labels
from reward_workers.components.format import json_or_none

_FORM = re.compile(r"<\|object_ref_start\|>[^<]*<\|object_ref_end\|>(?:<\|box_start\|>[^<]*<\|box_end\|>)+")
_RELEASED_STARTS = ("<", ">", "object_ref_start", "object_ref_end", "box_start", "box_end", "im_end")
_THOUSAND = Frame(1000, 1000)
_MIDDLE_AND_SIDES = np.kron([[0.5, -1], [0.5, 1]], np.eye(2))
"""(4, 4): x1 y1 x2 y2 -> middle and sides."""


@component()
def perception_r1_format(case: Case, *, released: bool = False) -> float:
    """1 iff the text is a name and one or more boxes in Qwen2-VL's special tokens.

    `released`: the bars of the tokens are not escaped in grounding's pattern, and so part alternatives of which one
    must begin the text: anything that begins with `<`, `>` or a token's bare name is right.
    """
    return float(case.text.startswith(_RELEASED_STARTS) if released else _FORM.fullmatch(case.text) is not None)


@component(needs={"points"})
def perception_r1_counting(case: Case, *, released: bool = False) -> float:
    """Ratio of the counts, times 1 - the mean distance of the matched points in diagonals of the frame 1000 x 1000.

    Points are the middles of the answered boxes. 0 without `perception_r1_format`, but that the empty list is worth 1
    where nothing is there, and never negative. `released`: 0 where nothing is there, and negative for boxes far
    outside the image.
    """
    if not case.target.count and not released:
        return float(case.answered and not case.answer.objects)
    boxes = np.array([one.box for one in case.answer.objects if one.box]).reshape(-1, 4)
    both = ((boxes[:, :2] + boxes[:, 2:]) / 2, case.target.points)
    said, true = (convert_points(points, case.image, _THOUSAND) for points in both)
    if not (perception_r1_format(case) and len(said) and len(true)):
        return 0.0
    apart = matching.pairwise_distance(said, true)
    near = 1 - apart[linear_sum_assignment(apart)].mean() / np.hypot(1000, 1000)
    return float(metrics.count_ratio(len(said), len(true)) * (near if released else max(0.0, near)))


@component(needs={"boxes", "labels"})
def perception_r1_detection(
    case: Case, *, categories: Sequence[str] = (), penalty: bool = False, by_size: bool = False, released: bool = False
) -> float:
    """0..3: 0.25 share of good items + 0.75 F1 + share of equal labels + mean IoU of the pairs whose IoU exceeds 0.5.

    Good items have a box and a label, one of `categories` where these are given. Pairs cost 5 L1 of middle and sides in
    shares of the image - 2 GIoU - [labels equal], as DETR's. `penalty`: less half of the shares of unmatched answers
    and unmatched truths (on by default there, off in the authors' script). `by_size`: sum(w IoU) / (n sum(IoU)) in
    place of the mean, w 3 below 32 x 32 pixels, 2 below 96 x 96, else 1. The empty list is worth 3 where nothing is
    there.

    `released`: 0 for the empty list, where a known label has a box that cannot be read, and for any toothbrush; no
    penalty without a pair; the text must be JSON as a whole; L1 counts in pixels, and labels not at all: there they do
    by less than 0.02, for categories whose ids differ by one, against 5 per pixel.
    """
    body = None if released else section(case.text, "answer")
    items = json_or_none(unfenced(body or case.text))
    items, true, truth = items if isinstance(items, list) else [], case.target.boxes, case.target
    good = [one for one in case.answer.objects if one.box and one.label and one.label in (categories or [one.label])]
    if released and _raises(items, len(good), categories):
        return 0.0
    if not good:
        return 3.0 * (case.answered and not (case.answer.objects or truth.count or released))
    value = 0.25 * min(1.0, len(good) / len(items or good))
    boxes, same = np.array([one.box for one in good]), same_labels(good, truth)
    iou, unit = matching.pairwise_iou(boxes, true), 1.0 if released else [case.image.width, case.image.height] * 2
    l1 = 4 * matching.pairwise_l1(boxes / unit @ _MIDDLE_AND_SIDES, true / unit @ _MIDDLE_AND_SIDES)
    pairs = linear_sum_assignment(5 * l1 - 2 * matching.pairwise_giou(boxes, true) - same * (not released))
    pairs = tuple(side[iou[pairs] > matching.IOU_HIT] for side in pairs)
    if count := len(pairs[0]):
        areas = (true[pairs[1], 2:] - true[pairs[1], :2]).prod(-1)
        weights = (3 - (areas >= 32**2) - (areas >= 96**2)) / iou[pairs].sum() if by_size else np.ones(count)
        value += 1.5 * count / (len(good) + len(true)) + same[pairs].mean() + (weights * iou[pairs]).mean()
    if penalty and (count or not released):
        value -= 0.5 * (2 - count / len(good) - count / max(1, len(true)))
    return float(np.clip(value, 0, 3))


def _raises(items: list[Any], good: int, categories: Sequence[str]) -> bool:
    """Whether the released arithmetic raises, or has nothing to begin with."""
    labels = [item.get("label") for item in items if isinstance(item, dict) and "bbox_2d" in item]
    known = [label for label in labels if isinstance(label, str) and label in (categories or [label])]
    return not items or len(known) > good or "toothbrush" in known


@component(needs={"text"})
def perception_r1_ocr(case: Case, *, both_empty: float = 1.0) -> float:
    """1 - edit distance / longer length, of the texts with single blanks. `both_empty`: 0 as released (0/0 there)."""
    said, true = (" ".join(text.split()) for text in (case.answer.text, case.target.text or ""))
    longest = max(len(said), len(true))
    return case.answered * (1 - metrics.edit_distance(said, true) / longest if longest else both_empty)
