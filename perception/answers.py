"""Completion text -> Answer.

Grammar: the body of the first `<answer>...</answer>` is a JSON list of objects

    {"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y], "label": "text"}

of which a task needs a box or a point. `[]` answers that nothing is there. Items are read one by one: what cannot be
read is left out, and an answer none of whose items can be read has not been given. No text raises; time is linear.
"""

from __future__ import annotations

from typing import Any

from perception.formats import MAX_OBJECTS, load, section
from perception.tasks import TASKS
from perception.types import Answer, AnswerObject, Failure, FailureKind

_LARGEST = 1e6  # a coordinate beyond this is no place in any image
_LABEL_LENGTH = 200


def parse(text: str, task: str) -> Answer:
    """Read a completion, in the frame it was written in. Lists are cut at 120 objects, as published.

    `task` names an entry of `perception.tasks.TASKS` (KeyError otherwise). The failure is UNPARSED when there is no
    closed answer block, no JSON list in it, or no readable item in a list that is not empty.
    """
    think, body = section(text, "think"), section(text, "answer")
    if body is None:
        return _unparsed(think, "no <answer>...</answer> in the completion")
    try:
        items = load(body)
    except ValueError as error:
        return _unparsed(think, f"the answer cannot be read as JSON: {error}")
    if not isinstance(items, list):
        return _unparsed(think, f"the answer is a JSON {type(items).__name__}, not a list")
    fields = TASKS[task].answer_fields
    read = (_read(item) for item in items[:MAX_OBJECTS])
    objects = tuple(item for item in read if item and any(getattr(item, field) is not None for field in fields))
    if items and not objects:
        return _unparsed(think, f"no item of the answer has a readable {' or '.join(fields)}")
    return Answer(objects=objects, think=think)


def _unparsed(think: str | None, detail: str) -> Answer:
    return Answer(objects=(), think=think, failure=Failure(kind=FailureKind.UNPARSED, detail=detail))


def _read(item: Any) -> AnswerObject | None:
    if not isinstance(item, dict):
        return None
    box, point, label = _numbers(item.get("bbox_2d"), 4), _numbers(item.get("point_2d"), 2), item.get("label")
    if box and (box[2] < box[0] or box[3] < box[1]):
        box = None
    return AnswerObject(
        box=(box[0], box[1], box[2], box[3]) if box else None,
        point=(point[0], point[1]) if point else None,
        label=label[:_LABEL_LENGTH] if isinstance(label, str) else None,
    )


def _numbers(value: Any, length: int) -> list[float] | None:
    """`length` finite numbers of sensible size, or None. NaN fails the comparison."""
    if not isinstance(value, list) or len(value) != length:
        return None
    if not all(type(number) in (int, float) and -_LARGEST <= number <= _LARGEST for number in value):
        return None
    return [float(number) for number in value]
