"""Passes of a trajectory: the answer of each turn in original pixels, its mask prompts, its confidence features."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from perception import masks
from perception.calibration import FEATURES, confidence
from perception.frames import view_to_image
from perception.tasks import TASKS
from perception.types import Answer, Candidate, LookState, MaskPrompt, Prompt, Trajectory, Turn, View

if TYPE_CHECKING:
    from reward_workers.segmenter import Segmentation


class Pass(NamedTuple):
    """One pass of a trajectory, parsed."""

    answer: Answer
    """In original pixels."""
    turn: Turn | None
    """None where nothing was sampled."""
    place: int
    """Position among the trajectory's passes, from 0."""


def read_passes(trajectory: Trajectory, prompt: Prompt) -> tuple[Pass, ...]:
    """The answer of each pass; () where the engine failed, the failure itself where nothing was sampled."""
    if trajectory.excluded:
        return ()
    if not trajectory.turns:
        return (Pass(Answer(objects=(), failure=trajectory.failure), None, 0),)
    task, turns = TASKS[prompt.task], enumerate(trajectory.turns)
    return tuple(Pass(view_to_image(task.parse(turn.text), view_of(turn, prompt)), turn, i) for i, turn in turns)


def view_of(turn: Turn | None, prompt: Prompt) -> View:
    """The part of the image that the turn was shown, or all of it, and the frame that its answer was written in."""
    if turn is not None and turn.view is not None:
        return turn.view
    sample = prompt.sample
    frame = {"height": prompt.answer_height, "width": prompt.answer_width}
    return View(left=0, top=0, right=sample.width, bottom=sample.height, **frame)


def mask_prompts(passes: Sequence[Pass], task: str, height: int, width: int) -> tuple[list[MaskPrompt], np.ndarray]:
    """The segmenter's prompts, as far as they lie in the image, and each prompt's pass (N,) int64."""
    prompts, owners = [], []
    for owner, one in enumerate(passes):
        for prompt in TASKS[task].mask_prompts(one.answer):
            inside = _inside(prompt, height, width)
            if inside.box or inside.points:
                prompts.append(inside)
                owners.append(owner)
    return prompts, np.array(owners, np.int64)


def _inside(prompt: MaskPrompt, height: int, width: int) -> MaskPrompt:
    """The box cut at the image's edges, None where nothing is left of it, and the points that lie inside."""
    box = prompt.box
    if box is not None:
        x1, x2 = (min(max(x, 0.0), float(width)) for x in box[0::2])
        y1, y2 = (min(max(y, 0.0), float(height)) for y in box[1::2])
        box = (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None
    kept = [i for i, (x, y) in enumerate(prompt.points) if 0 <= x < width and 0 <= y < height]
    labels = prompt.labels or (1,) * len(prompt.points)
    return MaskPrompt(box=box, points=tuple(prompt.points[i] for i in kept), labels=tuple(labels[i] for i in kept))


def judge(
    passes: Sequence[Pass],
    segmentation: "Segmentation | None",
    truth: np.ndarray | None,
    look: LookState | None,
    want_masks: bool,
) -> list[Candidate]:
    """One candidate per pass, segmented in the same order.

    `truth`: union of the true masks, (H, W) bool, where the answers' masks are to be compared with it. An answer that
    did not parse overlaps with nothing, also where nothing is there; so does one whose objects have no pixel in the
    image: only the empty list says that nothing is there.
    """
    segmented = segmentation.features if segmentation is not None else np.zeros((len(passes), 3))
    overlaps = segmentation.overlaps(truth) if segmentation is not None and truth is not None else None
    features = confidence_features(passes, segmented)
    sure = confidence(look.weights if look is not None else (), features)
    there = truth is not None and bool(truth.any())
    candidates = []
    for i, one in enumerate(passes):
        candidate = Candidate(answer=one.answer, features=tuple(features[i].tolist()), confidence=float(sure[i]))
        if overlaps is not None:
            said = one.answer.failure is None and (there or not one.answer.objects)
            iou, dice = overlaps[i].tolist() if said else (0.0, 0.0)
            candidate = replace(candidate, mask_iou=iou, mask_dice=dice)
        if segmentation is not None and want_masks and one.answer.objects:
            candidate = replace(candidate, mask=masks.encode(segmentation.mask(i)))
        candidates.append(candidate)
    return candidates


def confidence_features(passes: Sequence[Pass], segmented: np.ndarray) -> np.ndarray:
    """`perception.calibration.FEATURES` of each pass, (n, FEATURES); `segmented` (n, 3) are SAM2's."""
    own = []
    for one in passes:
        empty = one.answer.failure is None and not one.answer.objects
        certainty = float(np.mean(one.turn.logprobs)) if one.turn is not None and one.turn.logprobs else 0.0
        own.append((certainty, empty and one.place == 0, one.place > 0, empty and one.place > 0))
    return np.concatenate([segmented, np.array(own, np.float64).reshape(-1, len(FEATURES) - 3)], axis=1)
