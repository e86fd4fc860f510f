"""The tasks a sample may name: what an answer must hold, what the truth must hold, how success is reported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    name: str
    answer_fields: tuple[Literal["box", "point"], ...]
    """An answered object must hold at least one of these; SAM2 is prompted with either."""
    needs_masks: bool
    """The evaluation compares masks, so the held-out truth must have them."""
    headline: str
    """Name of the metric in `perception.metrics` that an evaluation leads with."""


TASKS = {
    task.name: task
    for task in (
        Task(name="segment", answer_fields=("box", "point"), needs_masks=True, headline="mask_iou"),
        Task(name="ground", answer_fields=("box",), needs_masks=False, headline="box_iou"),
        Task(name="count", answer_fields=("box", "point"), needs_masks=False, headline="count_exact"),
    )
}
