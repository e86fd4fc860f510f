"""Seg-Zero's task: one object, by its box and two points in it.

    <think>...</think><answer>{"bbox": [x1, y1, x2, y2], "points_1": [x, y], "points_2": [x, y]}</answer>

Read as the released evaluation does (`evaluation_scripts/evaluation.py`), which takes more than the prompt asks for:
the first braces anywhere, also in the thinking, the first key that contains "bbox", and the first two that contain
"points", in any case. Here `[]` in the answer says that nothing is there, a point that cannot be read is left out
(there the sample fails), and fractions are not cut off.
"""

import json

from perception.frames import Frame
from perception.grammar import braces, load, section
from perception.tasks import task
from perception.tasks.dr_seg import Normalised
from perception.tasks.objects import ObjectList, in_pixels, read_box, read_point, thought, unparsed
from perception.types import Answer, AnswerObject, Target


@task("seg_zero")
class SegZero(Normalised, ObjectList):
    metrics = ("mask_iou",)

    def parse(self, text: str) -> Answer:
        """One object. UNPARSED where there are no braces, no JSON in them, or no readable box."""
        try:
            given = load(braces(text) or section(text, "answer") or "")
        except ValueError as error:
            return unparsed(f"no braces that can be read as JSON: {error}")
        if given == []:
            return Answer(objects=())
        lower = [(key.lower(), value) for key, value in given.items()] if isinstance(given, dict) else []
        box = read_box(next((value for key, value in lower if "bbox" in key), None))
        if box is None:
            return unparsed("no readable bbox in the first braces")
        written = [value for key, value in lower if "points" in key][:2]
        points = [point for value in written if (point := read_point(value))]
        one = AnswerObject(box=box, point=points[0] if points else None, further=tuple(points[1:]))
        return Answer(objects=(one,))

    def write(self, target: Target, frame: Frame, inline: bool = False) -> str:
        """Of the first object; its second point is the first one again, as no truth has two."""
        boxes, points = in_pixels(target, frame)
        said = {"bbox": boxes[0], "points_1": points[0], "points_2": points[0]} if boxes else []
        return f"{thought(points[:1], frame, inline)}<answer>{json.dumps(said)}</answer>"
