"""Seg-Zero's task: one object, by its box and two points in it.

    <think>...</think><answer>{"bbox": [x1, y1, x2, y2], "points_1": [x, y], "points_2": [x, y]}</answer>

Read as the released evaluation does (`evaluation_scripts/evaluation.py`), which takes more than the prompt asks for:
the first braces anywhere, also in the thinking, the first key that contains "bbox", and the first two that contain
"points", in any case. Here `[]` in the answer says that nothing is there, a point that cannot be read is left out
(there the sample fails), and fractions are not cut off.
"""

import json
from typing import Any

from perception.frames import Frame
from perception.grammar import braces, section
from perception.tasks import task
from perception.tasks.dr_seg import Normalised
from perception.tasks.objects import ObjectList, in_pixels, read_box, read_point, thought
from perception.types import AnswerObject, Target


@task("seg_zero")
class SegZero(Normalised, ObjectList):
    needs = (("box",),)
    metrics = ("mask_iou",)

    def body(self, text: str) -> str | None:
        """The first braces as a list of one; where there are none, the answer block."""
        found = braces(text)
        return f"[{found}]" if found else section(text, "answer")

    def item(self, item: dict[str, Any]) -> AnswerObject:
        box = next((value for key, value in item.items() if "bbox" in key.lower()), None)
        points = [at for key, value in item.items() if "points" in key.lower() and (at := read_point(value))][:2]
        return AnswerObject(box=read_box(box), point=points[0] if points else None, further=tuple(points[1:]))

    def write(self, target: Target, frame: Frame, inline: bool = False) -> str:
        """The first object; its second point is the first one again, as no truth has two."""
        boxes, points = in_pixels(target, frame)
        said = {"bbox": boxes[0], "points_1": points[0], "points_2": points[0]} if boxes else []
        return f"{thought(points[:1], frame, inline)}<answer>{json.dumps(said)}</answer>"
