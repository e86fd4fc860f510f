"""labelme: a folder of JSON files, one per image, beside their images or with the image inside.

Polygons, circles and masks are masks, rectangles boxes, points points; a line has no area and is refused. Shapes of one
`group_id` are one object. `numbered=true`: an ending -1, -2, ... of a label numbers its objects and is no part of it.
"""

import base64
import math
import posixpath
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from perception import images
from perception.datasets import reader
from perception.datasets.files import parse, read_bytes
from perception.datasets.records import Record
from perception.datasets.shapes import Drawn, Shape, ellipse, questions
from perception.errors import DataError
from perception.types import ImageSource

KINDS = {"rectangle": "box", "oriented_rectangle": "polygon", "circle": "polygon", "points": "point"}


@reader("labelme")
def read(path: Path, *, numbered: bool = False, task: str = "segment") -> Iterator[Record]:
    """Every label of every file in the folder and those below."""
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: no .json file there; is data.train the folder of labelme's files?")
    for file in files:
        place = file.relative_to(path if path.is_dir() else path.parent).as_posix()
        yield from questions(path, place, partial(_drawn, file, place, numbered), task)


def _drawn(file: Path, place: str, numbered: bool) -> Drawn:
    content = parse(dict[str, Any], read_bytes(file), str(file))
    named, inside = content["imagePath"].replace("\\", "/"), content.get("imageData")
    image: ImageSource | str = posixpath.normpath(posixpath.join(posixpath.dirname(place), named))
    if inside and not (file.parent / named).is_file():
        image = ImageSource(path=f"{file}: imageData", data=base64.b64decode(inside))
    shapes = [_shape(one, numbered) for one in content["shapes"]]
    return Drawn(image, shapes, (content.get("imageHeight") or 0, content.get("imageWidth") or 0))


def _shape(given: dict[str, Any], numbered: bool) -> Shape:
    label, kind, group = str(given["label"]), given.get("shape_type") or "polygon", given.get("group_id")
    points = [(float(x), float(y)) for x, y in given["points"]]
    if kind == "circle":
        points = ellipse(*points[0], *[math.dist(*points)] * 2)
    if numbered and (numeral := re.fullmatch(r"(.+)-\d+", label)):
        label, group = numeral[1], label if group is None else group
    pixels = partial(_pixels, given["mask"]) if kind == "mask" else None
    return Shape(label, KINDS.get(kind, kind), points, group, pixels)


def _pixels(mask: str, height: int, width: int) -> np.ndarray:
    return np.asarray(images.decode(base64.b64decode(mask)).any(-1))
