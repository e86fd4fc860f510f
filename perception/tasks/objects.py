"""The grammar that segment, ground and count share: a JSON list of boxes and points (VisionReasoner's form).

The body of the first `<answer>...</answer>` is a JSON list of objects

    {"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y], "label": "text"}

of which a task needs a box or a point. `[]` answers that nothing is there. Items are read one by one: what cannot be
read is left out, and an answer none of whose items can be read has not been given.
"""

import json
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from perception.frames import Frame
from perception.grammar import MAX_OBJECTS, load, numbers, section
from perception.types import Answer, AnswerObject, Box, Failure, FailureKind, MaskPrompt, Point, Sample, Target

_LABEL_LENGTH = 200
_ROWS = ("upper", "", "lower")
_COLUMNS = ("left", "", "right")


class ObjectList:
    """Base of the tasks whose answers are lists of boxes and points."""

    needs: ClassVar[tuple[tuple[str, ...], ...]] = (("box",), ("point",))
    """An answered object must hold all parts of one of these."""

    def question(self, sample: Sample) -> str:
        return sample.question

    def body(self, text: str) -> str | None:
        """Where the list stands; None where there is none."""
        return section(text, "answer")

    def parse(self, text: str) -> Answer:
        """The failure is UNPARSED when there is no closed answer block, no JSON list in it, or no readable item in a
        list that is not empty. Lists are cut at 4,096 objects."""
        body = self.body(text)
        if body is None:
            return unparsed("no <answer>...</answer> in the completion")
        try:
            items = load(body)
        except ValueError as error:
            return unparsed(f"the answer cannot be read as JSON: {error}")
        if not isinstance(items, list):
            return unparsed(f"the answer is a JSON {type(items).__name__}, not a list")
        read = (self.item(item) for item in items[:MAX_OBJECTS] if isinstance(item, dict))
        objects = tuple(one for one in read if self._is_whole(one))
        if items and not objects:
            return unparsed(f"no item of the answer has a readable {' or '.join(map(' and '.join, self.needs))}")
        return Answer(objects=objects)

    def item(self, item: dict[str, Any]) -> AnswerObject:
        """What can be read of an item of the list."""
        box, point, label = (item.get(name) for name in ("bbox_2d", "point_2d", "label"))
        label = label[:_LABEL_LENGTH] if isinstance(label, str) else None
        return AnswerObject(box=read_box(box), point=read_point(point), label=label)

    def _is_whole(self, one: AnswerObject) -> bool:
        return any(all(getattr(one, part) is not None for part in parts) for parts in self.needs)

    def write(self, target: Target, frame: Frame, inline: bool = False) -> str:
        """A think block that says where, and the list; boxes and points in whole pixels inside the frame."""
        boxes, points = in_pixels(target, frame)
        items = [{"bbox_2d": box, "point_2d": point} for box, point in zip(boxes, points, strict=True)]
        answer = ", ".join(json.dumps(item).replace(", ", ",").replace(',"', ', "') for item in items)
        return f"{thought(points, frame, inline)}<answer>[{answer}]</answer>"

    def mask_prompts(self, answer: Answer) -> Sequence[MaskPrompt]:
        """One prompt per object: its box, and all its points."""
        return [_prompt(one) for one in answer.objects]


def in_pixels(target: Target, frame: Frame) -> tuple[list[list[int]], list[list[int]]]:
    """Boxes and points in whole pixels inside the frame; boxes may end at its edge, points may not."""
    limit = np.array([frame.width, frame.height])
    boxes = np.rint(target.boxes.reshape(-1, 4)).clip(0, np.tile(limit, 2)).astype(int).tolist()
    return boxes, np.rint(target.points.reshape(-1, 2)).clip(0, limit - 1).astype(int).tolist()


def thought(points: Sequence[Sequence[int]], frame: Frame, inline: bool) -> str:
    """A think block that says where the points lie; `inline`: in a `<look>` block."""
    places = " and ".join(whereabouts(point, frame) for point in points) or "nowhere"
    return f"<think>{f'<look>{places}</look>' if inline else places}</think>"


def whereabouts(point: Sequence[int], frame: Frame) -> str:
    """The third of the frame a point lies in, in words: 'upper left', 'middle', ..."""
    row = _ROWS[min(2, int(3 * point[1] // frame.height))]
    column = _COLUMNS[min(2, int(3 * point[0] // frame.width))]
    return " ".join(filter(None, (row, column))) or "middle"


def unparsed(detail: str) -> Answer:
    return Answer(objects=(), failure=Failure(kind=FailureKind.UNPARSED, detail=detail))


def read_box(value: Any) -> Box | None:
    """Four numbers, x1 <= x2 and y1 <= y2."""
    box = numbers(value, 4)
    return (box[0], box[1], box[2], box[3]) if box and box[0] <= box[2] and box[1] <= box[3] else None


def read_point(value: Any) -> Point | None:
    point = numbers(value, 2)
    return (point[0], point[1]) if point else None


def _prompt(one: AnswerObject) -> MaskPrompt:
    points = (*((one.point,) if one.point else ()), *one.further)
    labels = (1,) * len(points) + (0,) * len(one.background) if one.background else None
    return MaskPrompt(box=one.box, points=points + one.background, labels=labels)
