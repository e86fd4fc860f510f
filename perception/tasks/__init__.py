"""Tasks: how a question is put, how its answer is read and written, and by what it is judged. One file per task.

What a data set calls `task` names an entry of the settings' `task`, whose `form` names a task here (by default the one
of the same name). Prompt words stand in `conf/task/`.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from perception.frames import Frame
from perception.registry import Registry, import_all
from perception.types import Answer, MaskPrompt, Sample, Target


class Task(Protocol):
    metrics: tuple[str, ...]
    """Reward components (`reward_workers.components`) that held-out answers are measured by, the headline first. Each
    of them says what truth it needs."""

    def question(self, sample: Sample) -> str:
        """The text that replaces `{question}` in the prompt."""

    def parse(self, text: str) -> Answer:
        """Read a completion, in the frame it was written in. Never raises; linear in the text's length."""

    def write(self, target: Target, frame: Frame, inline: bool = False) -> str:
        """The ideal completion about a target that is measured in `frame`; `parse` reads it back.

        `inline`: with the `<look>` blocks that `look=inline` asks for.
        """

    def mask_prompts(self, answer: Answer) -> Sequence[MaskPrompt]:
        """The segmenter's prompts, in the answer's frame; their masks are united. (): no mask is drawn."""


K = TypeVar("K", bound=type)
TASKS: Registry[Task] = Registry("task")


def task(name: str) -> Callable[[K], K]:
    """Class decorator: register an instance under this name."""

    def add(kind: K) -> K:
        TASKS.register(name)(kind())
        return kind

    return add


import_all(__name__)
