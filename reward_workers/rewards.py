"""Reward components, each a documented pure function of one answer and its truth.

Two readings of an answer exist. `matching: binary` is the published one (Dr. Seg, VisionReasoner): their list of
objects, their IoU with both edge pixels counted, their values for empty matches. `matching: continuous` is ours: item
by item, and a completion without an answer is worth 0 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from perception import formats, metrics
from perception.config import RewardConfig
from perception.frames import METRIC, Frame, convert_boxes, convert_points, view_arrays_to_image
from perception.matching import Matched, Objects, match, objects_of_answer, objects_of_target
from perception.types import Answer, FailureKind, Target, View

UNMEASURED = frozenset({FailureKind.ENGINE, FailureKind.SCORER})
"""Failures of the infrastructure leave nothing to measure: such a score has no metrics."""


@dataclass(frozen=True)
class Case:
    """One completion beside its truth."""

    text: str
    answer: Answer
    """In original pixels."""
    target: Target
    image: Frame
    """The original image: the frame of `answer` and `target`."""
    view: View
    """What `text` is about, and the frame of the numbers in it."""
    published: bool
    """Read and match as the published systems do."""
    mask_iou: float = 0.0
    """Of the union of the answer's SAM2 masks with the union of the true ones, at the original size."""
    mask_dice: float = 0.0
    answered_mask: np.ndarray | None = None
    """(H, W) bool at the original size, where a component needs it (`ARRAY_COMPONENTS`)."""
    true_mask: np.ndarray | None = None

    @property
    def answered(self) -> bool:
        return self.answer.failure is None

    @cached_property
    def matched(self) -> Matched:
        """Answered and true objects in pairs; computed once for all components."""
        truth = objects_of_target(self.target, self.image)
        if not self.published:
            return match(objects_of_answer(self.answer, self.image), truth, "continuous")
        read = formats.published_objects(self.text)
        with np.errstate(over="ignore", invalid="ignore"):  # a model may answer 1e308
            boxes, points = view_arrays_to_image(read.boxes, read.points, self.view)
            objects = Objects(
                boxes=convert_boxes(boxes, self.image, METRIC), points=convert_points(points, self.image, METRIC)
            )
        return match(objects, truth, "binary", pixel=1.0)

    def value(self, of_match: Callable[[Matched], float]) -> float:
        """A metric of the match; ours is 0 where there is no answer."""
        return of_match(self.matched) if self.published or self.answered else 0.0


def _matched_iou(case: Case) -> float:
    """Mean box IoU of the matched pairs, 0..1 (Dr. Seg's x1)."""
    return case.value(lambda matched: metrics.matched_iou(matched, empty=0.0 if case.published else 1.0))


def _count_ratio(case: Case) -> float:
    """min(M, N) / max(M, N) of the answered and true counts, 0..1 (Dr. Seg's x2)."""
    return case.value(metrics.count_ratio)


def _point_score(case: Case) -> float:
    """Nearness of the matched points, 0..1 (Dr. Seg's x3)."""
    return case.value(lambda matched: metrics.point_score(matched, empty=0.0 if case.published else 1.0))


def _accuracy(case: Case) -> float:
    """VisionReasoner's thresholded hits, 0..3."""
    return case.value(metrics.vision_reasoner)


def _count_exact(case: Case) -> float:
    """1 iff as many objects were answered as there are."""
    return case.value(metrics.count_exact)


def _box_iou(case: Case) -> float:
    """IoU of the areas covered by all answered and all true boxes, 0..1."""
    answered = np.array([o.box for o in case.answer.objects if o.box]).reshape(-1, 4)
    return metrics.box_iou(answered, case.target.boxes) if case.answered else 0.0


def _mask_iou(case: Case) -> float:
    """IoU of the answer's SAM2 mask with the true one, 0..1; 1 where rightly nothing was answered."""
    return case.mask_iou if case.answered else 0.0


def _mask_dice(case: Case) -> float:
    """Dice coefficient of the same masks, 0..1."""
    return case.mask_dice if case.answered else 0.0


def _boundary_iou(case: Case) -> float:
    """IoU of the outlines of the same masks, 0..1 (Cheng et al. 2021)."""
    return metrics.boundary_iou(*_arrays(case)) if case.answered else 0.0


def _s_measure(case: Case) -> float:
    """Likeness of structure of the same masks, 0..1 (Fan et al. 2017; Seg-R1)."""
    return metrics.s_measure(*_arrays(case)) if case.answered else 0.0


def _arrays(case: Case) -> tuple[np.ndarray, np.ndarray]:
    if case.answered_mask is None or case.true_mask is None:
        raise ValueError("boundary_iou and s_measure need the answered and the true mask")
    return case.answered_mask, case.true_mask


def _parsed(case: Case) -> float:
    """1 iff the completion holds an answer in the task's grammar."""
    return float(case.answered)


def _non_repeat_plain(case: Case) -> float:
    """VisionReasoner's form: 0 if sentences, split at '.', repeat at least twice in all."""
    parts = case.text[: formats.LONGEST].split(".")
    sentences = [sentence for part in parts if (sentence := part.strip())]
    return float(len(sentences) - len(set(sentences)) < 2)


Component = Callable[[Case], float]
COMPONENTS: Mapping[str, Component] = {
    "think_format": lambda case: formats.think_format(case.text),
    "answer_format": lambda case: formats.answer_format(case.text),
    "look": lambda case: formats.look(case.text),
    "non_repeat": lambda case: formats.non_repeat(case.text),
    "non_repeat_plain": _non_repeat_plain,
    "parsed": _parsed,
    "matched_iou": _matched_iou,
    "count_ratio": _count_ratio,
    "point_score": _point_score,
    "accuracy": _accuracy,
    "count_exact": _count_exact,
    "box_iou": _box_iou,
    "mask_iou": _mask_iou,
    "mask_dice": _mask_dice,
    "boundary_iou": _boundary_iou,
    "s_measure": _s_measure,
}
ARRAY_COMPONENTS = frozenset({"boundary_iou", "s_measure"})
"""Components that need the masks themselves on the host."""
MASK_COMPONENTS = ARRAY_COMPONENTS | {"mask_iou", "mask_dice"}
"""Components that need SAM2."""


def components_in_use(config: RewardConfig) -> tuple[str, ...]:
    """Names the preset measures. Raises ValueError naming one that does not exist."""
    names = tuple(dict.fromkeys((*config.components, *config.ranked)))
    unknown = [name for name in names if name not in COMPONENTS]
    if unknown:
        raise ValueError(f"reward '{config.name}': no component '{unknown[0]}'; known: {', '.join(COMPONENTS)}")
    return names


def compares_masks(config: RewardConfig) -> bool:
    """Whether the preset needs SAM2's masks compared with true ones."""
    return config.rank == "group" or bool(MASK_COMPONENTS.intersection(components_in_use(config)))
