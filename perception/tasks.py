"""The tasks a sample may name: what an answer must hold and what the truth must hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    answer_fields: tuple[Literal["box", "point"], ...]
    """An answered object must hold at least one of these; SAM2 is prompted with either."""
    needs_masks: bool
    """The evaluation compares masks, so the held-out truth must have them."""


TASKS = {
    "segment": Task(answer_fields=("box", "point"), needs_masks=True),
    "ground": Task(answer_fields=("box",), needs_masks=False),
    "count": Task(answer_fields=("box", "point"), needs_masks=False),
}
