"""Task `corners`: one object, read from the first four numbers after the answer tag, whatever stands around them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from perception.frames import Frame
from perception.tasks import task
from perception.types import Answer, AnswerObject, Failure, FailureKind, MaskPrompt, Sample, Target

NUMBER = re.compile(r"\d{1,5}")


@task("corners")
class Corners:
    metrics = ("box_accuracy", "centre_distance")

    def question(self, sample: Sample) -> str:
        return sample.question.removesuffix("?")

    def parse(self, text: str) -> Answer:
        numbers = [float(found) for found in NUMBER.findall(text.partition("<answer>")[2].replace("_2d", ""))]
        if len(numbers) < 4:
            return Answer(objects=(), failure=Failure(kind=FailureKind.UNPARSED, detail="fewer than four numbers"))
        return Answer(objects=(AnswerObject(box=(numbers[0], numbers[1], numbers[2], numbers[3])),))

    def write(self, target: Target, frame: Frame, inline: bool = False) -> str:
        return f"<answer>{' '.join(f'{value:.0f}' for value in target.boxes[0])}"

    def mask_prompts(self, answer: Answer) -> Sequence[MaskPrompt]:
        return [MaskPrompt(box=one.box) for one in answer.objects]
