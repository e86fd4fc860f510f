"""CVAT for images 1.1: `annotations.xml`, or the folder that it lies in with `images/`.

Polygons, ellipses, turned boxes and masks are masks, boxes boxes, points points; a polyline or a cuboid has no area and
is refused. Shapes of one group and label are one object. CVAT's COCO export is read by `coco`.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from perception import masks
from perception.datasets import DataError, Records, reader
from perception.datasets.shapes import Drawn, Shape, ellipse, questions, read_xml, rectangle


@reader("cvat")
def read(path: Path, *, task: str = "segment") -> Records:
    """Every label of every image. Raises DataError where the file is none of CVAT's, or of a video."""
    root = read_xml(path / "annotations.xml" if path.is_dir() else path)
    if root.tag != "annotations" or root.find("track") is not None:
        raise DataError(f"{path}: not a file of 'CVAT for images 1.1'; export the task in that format")
    for image in root.iter("image"):
        yield from questions(path, image.get("name") or f"image {image.get('id')}", task, _drawn, image)


def _drawn(image: Element) -> Drawn:
    shapes = [_shape(one.tag, one.attrib) for one in image if one.tag != "tag"]
    return Drawn(image.attrib["name"], shapes, (int(image.get("height", 0)), int(image.get("width", 0))))


def _shape(kind: str, given: dict[str, str]) -> Shape:
    def numbers(keys: str) -> list[float]:
        return [float(given[key]) for key in keys.split()]

    label, group, turn = given["label"], given.get("group_id"), float(given.get("rotation", 0))
    if kind == "box":
        x1, y1, x2, y2 = box = numbers("xtl ytl xbr ybr")
        return rectangle(label, box, ((x1 + x2) / 2, (y1 + y2) / 2), turn, group)
    if kind == "ellipse":
        cx, cy, rx, ry = numbers("cx cy rx ry")
        return Shape(label, "polygon", ellipse(cx, cy, rx, ry, turn), group)
    if kind == "mask":
        runs, (left, top, *size) = [int(one) for one in given["rle"].split(",")], numbers("left top height width")
        return Shape(label, kind, [(left, top)], group, partial(_pixels, runs, *map(int, size)))
    points = [(float(x), float(y)) for x, y in (pair.split(",") for pair in given.get("points", "").split(";") if pair)]
    return Shape(label, "point" if kind == "points" else kind, points, group)


def _pixels(runs: Sequence[int], height: int, width: int, *image: int) -> np.ndarray:
    """Runs of 0, 1, 0, ... pixels of a window, row by row."""
    if height > image[0] or width > image[1]:
        raise ValueError(f"its window is {width}x{height}")
    masks.check_runs(np.array(runs), height, width)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
