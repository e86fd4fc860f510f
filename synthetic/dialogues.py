"""Ideal dialogues about synthetic scenes: one look, or a first answer that is a little wrong and a second look."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from launch.run.prompts import PromptMaker
from perception import masks, views
from perception.config import LookConfig
from perception.frames import Frame, image_to_view
from perception.tasks import TASKS
from perception.types import Answer, AnswerObject, ImageSource, Sample, Target, View
from synthetic.scenes import Question, Scene, SceneObject, SceneStyle, ask, generate

_WRONG_OBJECT = 0.15
"""Share of first answers that are about another object."""
_LARGEST_SHIFT = 0.6
"""Largest shift of a first answer's box, in sides of the box."""
_STRETCH = 0.3
_VISIBLE = 0.5
"""A target of which less than this share lies in the view is not in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """A question about a scene with its right answer, after one look or two."""

    images: tuple[np.ndarray, ...]
    """(H, W, 3) uint8: the scene, and the closer view where there is a second look."""
    input_ids: tuple[tuple[int, ...], ...]
    """Per turn the ids fed before it, image placeholders unexpanded."""
    completions: tuple[str, ...]
    """Per turn; only the last one is to be learned."""


def one_look(seed: int, style: SceneStyle, prompts: PromptMaker, inline: bool) -> Dialogue:
    """A question about a scene and its right answer. `inline`: in the form of `look=inline`."""
    scene = generate(seed, style)
    question = ask(scene, np.random.default_rng(seed), style)
    truth = [AnswerObject(box=scene.objects[i].box, point=scene.objects[i].point) for i in question.targets]
    completion = _completion(question.task, truth, _whole(scene, prompts), inline)
    input_ids = prompts.tokens(sample_of(scene, question), inline)
    return Dialogue(images=(scene.image,), input_ids=(input_ids,), completions=(completion,))


def two_looks(seed: int, style: SceneStyle, prompts: PromptMaker, look: LookConfig) -> Dialogue:
    """A first answer drawn around the truth, the view it leads to, and the right answer in the view's frame.

    A scene whose first answer covers too much for a closer view makes way for the next one.
    """
    scene = generate(seed, style)
    rng = np.random.default_rng(seed)
    question = ask(scene, rng, style)
    # Where nothing is, a policy may see anything.
    first = [_near(scene, i, rng) for i in question.targets or (int(rng.integers(len(scene.objects))),)]
    rect = views.closer_look(first, style.side, style.side, look.margin, look.smallest, look.min_zoom)
    if rect is None:
        return two_looks(seed + 1, style, prompts, look)
    picture = views.picture(scene.image, rect, _provisional_mask(scene, first, rng), look.pixels)
    view = prompts.view(rect, *picture.shape[:2])
    truth = [seen for i in question.targets if (seen := _seen(scene.objects[i], rect))]
    return Dialogue(
        images=(scene.image, picture),
        input_ids=(prompts.tokens(sample_of(scene, question)), prompts.again(question.task)),
        completions=(
            _completion(question.task, first, _whole(scene, prompts)),
            _completion(question.task, truth, view),
        ),
    )


def sample_of(scene: Scene, question: Question) -> Sample:
    """The question as a data set would hold it."""
    height, width = scene.image.shape[:2]
    target = _target([scene.objects[i] for i in question.targets])
    return Sample(
        id="scene",
        image=ImageSource(path=""),
        height=height,
        width=width,
        question=question.text,
        task=question.task,
        target=target,
    )


def _near(scene: Scene, index: int, rng: np.random.Generator) -> AnswerObject:
    """The object's box moved and stretched, or another object's."""
    if rng.random() < _WRONG_OBJECT:
        index = int(rng.integers(len(scene.objects)))
    x1, y1, x2, y2 = scene.objects[index].box
    size = np.array([x2 - x1, y2 - y1])
    centre = np.array([x1 + x2, y1 + y2]) / 2 + rng.normal(0, rng.uniform(0.05, _LARGEST_SHIFT), 2) * size
    half = size * np.exp(rng.normal(0, _STRETCH, 2)) / 2
    box = np.clip(np.concatenate([centre - half, centre + half]), 0, len(scene.image) - 1).tolist()
    point = np.clip(centre + rng.normal(0, 0.1, 2) * size, 0, len(scene.image) - 1).tolist()
    return AnswerObject(box=(box[0], box[1], box[2], box[3]), point=(point[0], point[1]))


def _provisional_mask(scene: Scene, first: Sequence[AnswerObject], rng: np.random.Generator) -> np.ndarray:
    """Roughly what a segmenter makes of the first answer: the object under it, cut or swollen, or just the box."""
    mask = np.zeros(scene.image.shape[:2], np.uint8)
    for item in first:
        assert item.box is not None
        left, top, right, bottom = (round(value) for value in item.box)
        area = np.zeros_like(mask)
        area[top : bottom + 1, left : right + 1] = 1
        under = max(scene.objects, key=lambda candidate: int((candidate.mask & (area > 0)).sum()))
        found = under.mask.astype(np.uint8)
        if not (found & area).any() or rng.random() < 0.15:
            cv2.ellipse(mask, ((left + right) // 2, (top + bottom) // 2),
                        (max(1, (right - left) // 2), max(1, (bottom - top) // 2)), 0, 0, 360, 1, -1)  # fmt: skip
            continue
        if rng.random() < 0.3:
            found &= cv2.dilate(area, np.ones((9, 9), np.uint8))
        kernel = np.ones((int(rng.integers(1, 6)),) * 2, np.uint8)
        mask |= cv2.dilate(found, kernel) if rng.random() < 0.5 else cv2.erode(found, kernel)
    return mask.astype(bool)


def _seen(target: SceneObject, rect: views.Rect) -> AnswerObject | None:
    """The part of the object inside the view, if enough of it is."""
    left, top, right, bottom = rect
    part = target.mask[top:bottom, left:right]
    if part.sum() < _VISIBLE * target.mask.sum():
        return None
    (x1, y1, x2, y2), (x, y) = masks.extent(part)
    return AnswerObject(box=(left + x1, top + y1, left + x2, top + y2), point=(left + x, top + y))


def _whole(scene: Scene, prompts: PromptMaker) -> View:
    height, width = scene.image.shape[:2]
    return prompts.view((0, 0, width, height), height, width)


def _completion(task: str, objects: Sequence[AnswerObject], view: View, inline: bool = False) -> str:
    """The objects (original pixels) as the policy is to write them about the view, in its frame."""
    inside = image_to_view(Answer(objects=tuple(objects)), view).objects
    return TASKS[task].write(_target(inside), Frame(view.height, view.width), inline)


def _target(objects: Sequence[AnswerObject | SceneObject]) -> Target:
    return Target(
        boxes=np.array([item.box for item in objects], np.float64).reshape(-1, 4),
        points=np.array([item.point for item in objects], np.float64).reshape(-1, 2),
    )
