"""labelme: a folder of JSON files, one per image, beside their images or with the image inside.

Polygons, circles and masks are masks, rectangles boxes, points points; a line has no area and is refused. Shapes of one
`group_id` are one object. `numbered=true`: an ending -1, -2, ... of a label numbers its objects and is no part of it.
"""

import base64
import math
import re
from pathlib import Path
from typing import Any

from perception.datasets import Records, files_in, find_file, parse, read_bytes, reader
from perception.datasets.mask_files import read_mask
from perception.datasets.shapes import Drawn, Shape, ellipse, questions

KINDS = {"rectangle": "box", "oriented_rectangle": "polygon", "circle": "polygon", "points": "point"}


@reader("labelme")
def read(path: Path, *, numbered: bool = False, task: str = "segment") -> Records:
    """Every label of every file of the folder."""
    for file in [path] if path.is_file() else files_in(path, ".json"):
        yield from questions(path, file.name, task, _drawn, file, numbered)


def _drawn(file: Path, numbered: bool) -> Drawn:
    content = parse(dict[str, Any], read_bytes(file), str(file))
    image, inside = str(content["imagePath"]), content.get("imageData")
    if inside and not find_file([file.parent], image):
        image = f"data:image;base64,{inside}"
    shapes = [_shape(one, numbered, str(file)) for one in content["shapes"]]
    return Drawn(image, shapes, (content.get("imageHeight") or 0, content.get("imageWidth") or 0))


def _shape(given: dict[str, Any], numbered: bool, where: str) -> Shape:
    label, kind, group = given["label"], given.get("shape_type") or "polygon", given.get("group_id")
    points = [(float(x), float(y)) for x, y in given["points"]]
    if kind == "circle":
        points = ellipse(*points[0], *[math.dist(*points)] * 2)
    if numbered and (numeral := re.fullmatch(r"(.+)-\d+", label)):
        label, group = numeral[1], label if group is None else group
    pixels = (lambda *_: read_mask(base64.b64decode(given.get("mask") or ""), where)) if kind == "mask" else None
    return Shape(label, KINDS.get(kind, kind), points, group, pixels)
