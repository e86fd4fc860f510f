"""Perception-R1's grounding and counting: boxes in Qwen2-VL's own form, without thinking.

    <|object_ref_start|>the dogs<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|><|box_start|>...<|box_end|>

Of a box its four numbers count, whatever the brackets, and names are not looked at. A text without such a box is read
as JSON like `detect`'s, without labels, too; counting also takes points there. Where we differ: numbers are in the
policy's answer frame (0..1000 for Qwen2-VL) in either form, where the released code takes those outside marks for
shares of the image; in grounding all boxes count, there the first alone, by kind of bracket before place; and `[]` says
that nothing is there, where the released evaluation never counts 0.
"""

import re

from perception.frames import Frame
from perception.grammar import MAX_OBJECTS
from perception.tasks import task
from perception.tasks.detect import Bare
from perception.tasks.objects import in_pixels, read_box
from perception.types import Answer, AnswerObject, Target

_BOX = re.compile(r"<\|box_start\|>([^<]*)<\|box_end\|>")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?", re.ASCII)


@task("perception_r1_count")
class PerceptionR1Count(Bare):
    metrics = ("count_exact", "count_ratio")

    def parse(self, text: str) -> Answer:
        """Boxes that cannot be read are left out. UNPARSED where none can, and the text is no JSON list."""
        marked = ([float(one) for one in _NUMBER.findall(body)] for body in _BOX.findall(text)[:MAX_OBJECTS])
        objects = tuple(AnswerObject(box=box) for found in marked if (box := read_box(found)))
        return Answer(objects=objects) if objects else super().parse(text)

    def write(self, target: Target, frame: Frame, inline: bool = False) -> str:
        """All boxes under the first label; of a target without labels it is "object"."""
        boxes, (name, *_) = in_pixels(target, frame)[0], target.labels or ("object",)
        marked = "".join(f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>" for x1, y1, x2, y2 in boxes)
        answer = f"<|object_ref_start|>{name.replace('<', '')}<|object_ref_end|>{marked}" if boxes else "[]"
        return self.framed(answer, target, frame, inline)


@task("perception_r1_ground")
class PerceptionR1Ground(PerceptionR1Count):
    needs = (("box",),)
    metrics = ("box_accuracy", "box_iou")
