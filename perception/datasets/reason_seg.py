"""ReasonSeg as LISA published it (github.com/dvlab-research/LISA): a folder train, val or test of NAME.jpg + NAME.json.

    {"text": ["what one would hold"], "is_sentence": true, "shapes": [{"label": "target", "points": [[x, y], ...]}]}

The target is the union of the shapes, drawn as LISA draws them: filled polygons with their outlines, corners cut to
whole pixels, larger ones first, so that a small region to ignore is cut out of a large target and the other way round.

`ignore` must be chosen, since published figures differ by it: regions labelled so are `background` (LISA, LENS, Seg-R1)
or `target` (the tables of Seg-Zero and VisionReasoner), or with `drop` their pixels leave every mask that is compared.
Evaluations ask with the first of a file's `texts`.
"""

import codecs
from functools import partial
from pathlib import Path
from typing import Literal

import cv2
import msgspec
import numpy as np

from perception import masks
from perception.datasets import DataError, Records, Texts, each, files, objects, per_text, reader
from perception.types import Point, Target

_TARGET, _IGNORE = 1, 255
Ignore = Literal["background", "target", "drop"]
# Some files are not UTF-8.
codecs.register_error("cp1252", lambda e: (e.object[e.start : e.end].decode("cp1252", "replace"), e.end))  # type: ignore[attr-defined]


class Shape(msgspec.Struct):
    label: str
    points: list[Point]


class Annotated(msgspec.Struct):
    text: list[str]
    shapes: list[Shape]


@reader("reason_seg")
def read(path: Path, *, ignore: Ignore, texts: Texts = "first", task: str = "segment") -> Records:
    """Every JSON file of the folder. Raises DataError where there is none."""

    def records(file: Path) -> Records:
        found = files.parse(Annotated, files.read_bytes(file).decode("utf-8", "cp1252"), str(file))
        truth, image = partial(_truth, found.shapes, ignore), file.with_suffix(".jpg").name
        return per_text(found.text, texts, file.stem, image=image, task=task, truth=truth, place=file.name)

    return each(files.files_in(path, ".json"), records)


def _truth(shapes: list[Shape], ignore: Ignore, height: int, width: int, where: str) -> Target:
    farthest = max((abs(value) for one in shapes for corner in one.points for value in corner), default=0.0)
    if farthest > 2 * max(height, width):  # OpenCV draws a huge polygon for minutes
        raise DataError(f"{where}: a polygon lies far outside the {width}x{height} image; mend its points", "mask")
    drawn = _draw(shapes, height, width)
    mask = drawn != 0 if ignore == "target" else drawn == _TARGET
    doubtful = masks.encode(drawn == _IGNORE) if ignore == "drop" else None
    return objects.mask_target(mask, height, width, where, ignore=doubtful)


def _draw(shapes: list[Shape], height: int, width: int) -> np.ndarray:
    """(H, W) uint8: 0, 1 in targets, 255 in regions to ignore."""
    used = [one for one in shapes if one.label.lower() != "flag" and one.points]
    areas = [int(_fill(np.zeros((height, width), np.uint8), one, 1).sum()) for one in used]
    drawn = np.zeros((height, width), np.uint8)
    for index in np.argsort(areas)[::-1]:
        _fill(drawn, used[index], _IGNORE if "ignore" in used[index].label.lower() else _TARGET)
    return drawn


def _fill(drawn: np.ndarray, shape: Shape, value: int) -> np.ndarray:
    corners = [np.array(shape.points).astype(np.int32)]
    return cv2.fillPoly(cv2.polylines(drawn, corners, True, value, 1), corners, value)
