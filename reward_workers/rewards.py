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
from perception.types import Answer, Target, View


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

    @property
    def no_pairs(self) -> float:
        """What means over the matched pairs are worth where both sides are empty."""
        return 0.0 if self.published else 1.0

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Answered and true mask. Raises ValueError where a component needs them and they are not there."""
        if self.answered_mask is None or self.true_mask is None:
            raise ValueError("boundary_iou and s_measure need the answered and the true mask")
        return self.answered_mask, self.true_mask


Component = Callable[[Case], float]


def _answered(measure: Component) -> Component:
    """Worth 0 where there is no answer."""
    return lambda case: measure(case) if case.answered else 0.0


def _matched(measure: Component) -> Component:
    """A metric of the match; the published ones are defined without an answer, ours is then 0."""
    return lambda case: measure(case) if case.published or case.answered else 0.0


def _box_iou(case: Case) -> float:
    answered = np.array([o.box for o in case.answer.objects if o.box]).reshape(-1, 4)
    return metrics.box_iou(answered, case.target.boxes)


def _non_repeat_plain(case: Case) -> float:
    parts = case.text[: formats.LONGEST].split(".")
    sentences = [sentence for part in parts if (sentence := part.strip())]
    return float(len(sentences) - len(set(sentences)) < 2)


COMPONENTS: Mapping[str, Component] = {
    "think_format": lambda case: formats.think_format(case.text),
    "answer_format": lambda case: formats.answer_format(case.text),
    "look": lambda case: formats.look(case.text),
    "non_repeat": lambda case: formats.non_repeat(case.text),
    # VisionReasoner's form: 0 if sentences, split at '.', repeat at least twice in all
    "non_repeat_plain": _non_repeat_plain,
    # 1 iff the completion holds an answer in the task's grammar
    "parsed": lambda case: float(case.answered),
    # Mean box IoU of the matched pairs (Dr. Seg's x1)
    "matched_iou": _matched(lambda case: metrics.matched_iou(case.matched, empty=case.no_pairs)),
    # min(M, N) / max(M, N) of the answered and true counts (Dr. Seg's x2)
    "count_ratio": _matched(lambda case: metrics.count_ratio(case.matched)),
    # Nearness of the matched points (Dr. Seg's x3)
    "point_score": _matched(lambda case: metrics.point_score(case.matched, empty=case.no_pairs)),
    # VisionReasoner's thresholded hits, 0..3
    "accuracy": _matched(lambda case: metrics.vision_reasoner(case.matched)),
    # 1 iff as many objects were answered as there are
    "count_exact": _matched(lambda case: metrics.count_exact(case.matched)),
    # IoU of the areas covered by all answered and all true boxes
    "box_iou": _answered(_box_iou),
    # Of the answer's SAM2 mask and the true one: IoU, Dice, IoU of the outlines (Cheng et al. 2021), likeness of
    # structure (Fan et al. 2017; Seg-R1). 1 where rightly nothing was answered
    "mask_iou": _answered(lambda case: case.mask_iou),
    "mask_dice": _answered(lambda case: case.mask_dice),
    "boundary_iou": _answered(lambda case: metrics.boundary_iou(*case.arrays)),
    "s_measure": _answered(lambda case: metrics.s_measure(*case.arrays)),
}
"""Values lie in 0..1 unless said otherwise."""
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
