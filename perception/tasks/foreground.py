"""Seg-R1's tasks: the foreground of an image, or what is asked for, by boxes and by points on and beside it.

    <think>...</think> <bbox>[x1,y1,x2,y2]</bbox>, <points>[[x,y],[x,y]]</points>, <labels>[1,0]</labels>

As released (`grpo.py`): any number of boxes, the first points and the first labels, whole
numbers that are not negative, in any order with anything between. Where there are not as many labels as points, both
are left out. Every box prompts SAM2 with the points in it, edges included; points without any box prompt it alone,
which the released reward refuses and the released evaluation does. Here empty points and empty labels without a box say
that nothing is there; an inverted box is not read; a label beyond 1, SAM2's code for a box's corner, leaves its point
out; and no more than 128 boxes and points are looked at.
"""

import json
from collections.abc import Sequence
from itertools import islice
from typing import Any, ClassVar

from perception.frames import Frame
from perception.grammar import lists
from perception.tasks import task
from perception.tasks.objects import ObjectList, in_pixels, read_box, read_point, thought, unparsed
from perception.types import Answer, AnswerObject, Box, Point, Target

MOST = 128


@task("foreground")
class Foreground(ObjectList):
    metrics = ("s_measure", "mask_iou")
    boxed: ClassVar = True

    def parse(self, text: str) -> Answer:
        """An object for each box. UNPARSED where nothing can be read, unless points and labels are empty lists."""
        points, labels = (next(lists(text, tag), None) for tag in ("points", "labels"))
        read = [at for value in points or () if (at := read_point(value))]
        whole = len(read) == len(points or ()) == len(labels or ())
        pairs = [(at, label) for at, label in zip(read, labels or (), strict=True) if label in (0, 1)] if whole else []
        found = islice(lists(text, "bbox"), MOST if self.boxed else 0)
        boxes: list[Box | None] = [box for value in found if (box := read_box(value))]
        objects = [_object(box, pairs[:MOST]) for box in boxes or [None] if box or pairs]
        if not objects and not points == labels == []:
            return unparsed("no readable <bbox>, and no <points> with as many <labels>")
        return Answer(objects=tuple(objects))

    def write(self, target: Target, frame: Frame, inline: bool = False) -> str:
        """All boxes, and the points, all on the foreground: no truth names points beside it."""
        boxes, points = in_pixels(target, frame)
        tags = [f"<bbox>{_text(box)}</bbox>" for box in boxes or [[]]] if self.boxed else []
        tags += [f"<points>{_text(points)}</points>", f"<labels>{_text([1] * len(points))}</labels>"]
        return (f"{thought(points, frame, inline)} " if self.boxed or inline else "") + ", ".join(tags)


@task("foreground_points")
class ForegroundPoints(Foreground):
    """The task of Seg-R1's pre-training by RL: points and labels alone, without thinking; boxes are not looked at."""

    boxed = False


def _object(box: Box | None, pairs: Sequence[tuple[Point, int]]) -> AnswerObject:
    """The box with the points in it; without a box, all points."""
    near = [(at, label) for at, label in pairs if not box or (box[0] <= at[0] <= box[2] and box[1] <= at[1] <= box[3])]
    on, off = (tuple(at for at, label in near if label == wanted) for wanted in (1, 0))
    return AnswerObject(box=box, point=on[0] if on else None, further=on[1:], background=off)


def _text(value: list[Any]) -> str:
    return json.dumps(value, separators=(",", ":"))
