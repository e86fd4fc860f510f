"""Detection of every object of the categories that the question lists: a JSON list of boxes and labels.

    [{"bbox_2d": [x1, y1, x2, y2], "label": "person"}, ...]

Perception-R1's form: without thinking, all of the text, in a code fence or not (its reward), or in an answer block (its
evaluation). Where we differ: an item that cannot be read is left out, where its evaluation drops the rest of the list;
a label that was not asked for counts as a wrong answer, where its evaluation passes it over; an empty list says that
nothing is there, and its reward gives that nothing.
"""

import json

from perception.frames import Frame
from perception.grammar import section, unfenced
from perception.tasks import task
from perception.tasks.objects import ObjectList, in_pixels, thought
from perception.types import Target


class Bare(ObjectList):
    """Base of the tasks whose answers need no thinking and no tags."""

    def body(self, text: str) -> str | None:
        """The answer block, all of a text that opens none; without code fences."""
        body = section(text, "answer") if "<answer>" in text else text
        return None if body is None else unfenced(body)

    def framed(self, answer: str, target: Target, frame: Frame, inline: bool) -> str:
        """The answer alone, or with `inline` after the thinking that `look=inline` asks for."""
        think = thought(in_pixels(target, frame)[1], frame, inline)
        return f"{think}<answer>{answer}</answer>" if inline else answer


@task("detect")
class Detect(Bare):
    needs = (("box", "label"),)
    metrics = ("detection_f1", "box_iou")

    def write(self, target: Target, frame: Frame, inline: bool = False) -> str:
        """The list on one line; of a target without labels each is "object"."""
        boxes, labels = in_pixels(target, frame)[0], target.labels or ("object",) * len(target.boxes)
        items = [{"bbox_2d": box, "label": label} for box, label in zip(boxes, labels, strict=True)]
        return self.framed(json.dumps(items, ensure_ascii=False), target, frame, inline)
