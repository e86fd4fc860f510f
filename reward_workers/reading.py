"""Completions read as answers in original pixels, and answers as prompts for SAM2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perception import answers
from perception.frames import view_to_image
from perception.types import INFRASTRUCTURE, Answer, Group, Prompt, Trajectory, Turn, View


@dataclass(frozen=True, slots=True)
class Pass:
    """One look of a trajectory, understood."""

    answer: Answer
    """In original pixels."""
    turn: Turn | None
    """None where nothing was said."""
    place: int
    """Among the trajectory's passes, from 0."""


def read_passes(trajectory: Trajectory, group: Group) -> tuple[Pass, ...]:
    """What each pass answered; () where the infrastructure failed, the failure itself where nothing was said."""
    if trajectory.failure is not None and trajectory.failure.kind in INFRASTRUCTURE:
        return ()
    if not trajectory.turns:
        return (Pass(Answer(objects=(), failure=trajectory.failure), None, 0),)
    prompt = group.prompt
    return tuple(
        Pass(view_to_image(answers.parse(turn.text, prompt.sample.task), view_of(turn, prompt)), turn, place)
        for place, turn in enumerate(trajectory.turns)
    )


def view_of(turn: Turn | None, prompt: Prompt) -> View:
    """What the turn was an answer about, in the frame it was written in: a part of the image, or all of it."""
    if turn is not None and turn.view is not None:
        return turn.view
    sample = prompt.sample
    frame = {"height": prompt.answer_height, "width": prompt.answer_width}
    return View(left=0, top=0, right=sample.width, bottom=sample.height, **frame)


def mask_prompts(passes: Sequence[Pass], height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (N, 4) and points (N, 2) that lie in the image, NaN where not given, and each prompt's pass (N,)."""
    rows = [
        (*(item.box or (np.nan,) * 4), *(item.point or (np.nan,) * 2), owner)
        for owner, one in enumerate(passes)
        for item in one.answer.objects
    ]
    table = np.array(rows, np.float64).reshape(-1, 7)
    boxes, points, owners = table[:, :4], table[:, 4:6], table[:, 6].astype(np.int64)
    limit = np.array([width, height], np.float64)
    boxes = np.clip(boxes, 0, np.tile(limit, 2))
    boxes[~(boxes[:, 2:] > boxes[:, :2]).all(1)] = np.nan
    points[~((points >= 0) & (points < limit)).all(1)] = np.nan
    given = ~(np.isnan(boxes).any(1) & np.isnan(points).any(1))
    return boxes[given], points[given], owners[given]
