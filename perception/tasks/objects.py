"""The grammar that segment, ground and count share: a JSON list of boxes and points (VisionReasoner's form).

The body of the first `<answer>...</answer>` is a JSON list of objects

    {"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y], "label": "text"}

of which a task needs a box or a point. `[]` answers that nothing is there. Items are read one by one: what cannot be
read is left out, and an answer none of whose items can be read has not been given.
"""

import json
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from perception.frames import Frame
from perception.grammar import MAX_OBJECTS, load, numbers, section
from perception.types import Answer, AnswerObject, Failure, FailureKind, MaskPrompt, Sample, Target

_LABEL_LENGTH = 200
_ROWS = ("upper", "", "lower")
_COLUMNS = ("left", "", "right")


class ObjectList:
    """Base of the tasks whose answers are lists of boxes and points."""

    fields: ClassVar[tuple[Literal["box", "point"], ...]] = ("box", "point")
    """An answered object must hold at least one of these."""

    def question(self, sample: Sample) -> str:
        return sample.question

    def parse(self, text: str) -> Answer:
        """The failure is UNPARSED when there is no closed answer block, no JSON list in it, or no readable item in a
        list that is not empty. Lists are cut at 4,096 objects."""
        body = section(text, "answer")
        if body is None:
            return _unparsed("no <answer>...</answer> in the completion")
        try:
            items = load(body)
        except ValueError as error:
            return _unparsed(f"the answer cannot be read as JSON: {error}")
        if not isinstance(items, list):
            return _unparsed(f"the answer is a JSON {type(items).__name__}, not a list")
        read = (_read(item) for item in items[:MAX_OBJECTS])
        objects = tuple(one for one in read if one and any(getattr(one, field) is not None for field in self.fields))
        if items and not objects:
            return _unparsed(f"no item of the answer has a readable {' or '.join(self.fields)}")
        return Answer(objects=objects)

    def write(self, target: Target, frame: Frame, inline: bool = False) -> str:
        """A think block that says where, and the list; boxes and points in whole pixels inside the frame."""
        limit = np.array([frame.width, frame.height])
        boxes = np.rint(target.boxes.reshape(-1, 4)).clip(0, np.tile(limit, 2)).astype(int).tolist()
        points = np.rint(target.points.reshape(-1, 2)).clip(0, limit - 1).astype(int).tolist()
        places = " and ".join(whereabouts(point, frame) for point in points) or "nowhere"
        items = [{"bbox_2d": box, "point_2d": point} for box, point in zip(boxes, points, strict=True)]
        answer = ", ".join(json.dumps(item).replace(", ", ",").replace(',"', ', "') for item in items)
        think = f"<look>{places}</look>" if inline else places
        return f"<think>{think}</think><answer>[{answer}]</answer>"

    def mask_prompts(self, answer: Answer) -> Sequence[MaskPrompt]:
        """One prompt per object: its box, with its point as foreground."""
        return [MaskPrompt(box=one.box, points=(one.point,) if one.point else ()) for one in answer.objects]


def whereabouts(point: Sequence[int], frame: Frame) -> str:
    """The third of the frame a point lies in, in words: 'upper left', 'middle', ..."""
    row = _ROWS[min(2, int(3 * point[1] // frame.height))]
    column = _COLUMNS[min(2, int(3 * point[0] // frame.width))]
    return " ".join(filter(None, (row, column))) or "middle"


def _unparsed(detail: str) -> Answer:
    return Answer(objects=(), failure=Failure(kind=FailureKind.UNPARSED, detail=detail))


def _read(item: Any) -> AnswerObject | None:
    if not isinstance(item, dict):
        return None
    box, point, label = numbers(item.get("bbox_2d"), 4), numbers(item.get("point_2d"), 2), item.get("label")
    if box and (box[2] < box[0] or box[3] < box[1]):
        box = None
    return AnswerObject(
        box=(box[0], box[1], box[2], box[3]) if box else None,
        point=(point[0], point[1]) if point else None,
        label=label[:_LABEL_LENGTH] if isinstance(label, str) else None,
    )
