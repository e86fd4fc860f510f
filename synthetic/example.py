"""One drawn question, for a look at what a model makes of it: a red rectangle on grey."""

import io
from dataclasses import replace

import numpy as np
from PIL import Image

from perception import masks
from perception.frames import Frame, convert_boxes, convert_points
from perception.types import ImageSource, Sample, Target

HEIGHT, WIDTH = 200, 300
LEFT, TOP, RIGHT, BOTTOM = 30, 40, 90, 100


def example(task: str, turned: bool = False) -> Sample:
    """A sample with every part of a truth. `turned`: the picture upside down, where the answer is another one."""
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[TOP:BOTTOM, LEFT:RIGHT] = True
    grey = np.add.outer(np.linspace(60, 160, HEIGHT), np.linspace(0, 80, WIDTH))
    drawn = np.where(inside[..., None], (220, 30, 30), grey[..., None]).astype(np.uint8)
    if turned:
        inside, drawn = inside[::-1, ::-1], drawn[::-1, ::-1]
    png, mask = io.BytesIO(), masks.encode(inside)
    Image.fromarray(drawn).save(png, "png")
    box = np.array(masks.bounding_box(mask), np.float32)
    return Sample(
        id="example",
        image=ImageSource(path="the drawn example", data=png.getvalue()),
        height=HEIGHT,
        width=WIDTH,
        question="the red rectangle",
        task=task,
        target=Target(
            boxes=box[None],
            points=box.reshape(1, 2, 2).mean(1),
            masks=(mask,),
            labels=("rectangle",),
            text="red rectangle",
        ),
    )


def in_frame(sample: Sample, frame: Frame) -> Target:
    """The truth with boxes and points measured in another frame than the image's pixels."""
    source, target = Frame(sample.height, sample.width), sample.target
    boxes, points = convert_boxes(target.boxes, source, frame), convert_points(target.points, source, frame)
    return replace(target, boxes=boxes, points=points)


def picture(sample: Sample) -> Image.Image:
    """What `example` has drawn."""
    return Image.open(io.BytesIO(sample.image.data or b""))
