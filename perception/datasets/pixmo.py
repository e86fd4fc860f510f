"""Counting: PixMo-Count, PixMo-Points and CountBench, tables with a count, and where they have them points.

PixMo-Count gives points as {"x": [...], "y": [...]} in pixels (none in its validation and test splits: a count alone),
PixMo-Points as [{"x": ..., "y": ...}, ...] in percent. Their tables hold addresses, not pictures: what was downloaded
is found in `data.images` by `name`.
"""

import re
from functools import partial
from pathlib import Path

import numpy as np

from perception.datasets import DataError, Record, Records, reader
from perception.tables import open_table, rows
from perception.types import ImageSource, Target

_NUMBER = re.compile(r"\b(two|three|four|five|six|seven|eight|nine|ten)\b ?", re.IGNORECASE)


@reader("pixmo")
def read(path: Path, *, split: str = "", task: str = "count", name: str = "{sha256}.jpg") -> Records:
    """Every row. `name`: of a picture's file, from the row's {sha256} or its number, as {row:05d}.jpg."""
    pictures = "image" in open_table(str(path), split).column_names
    for source, cells in rows(path, split, "label", "image_sha256"):
        try:
            image = source if pictures else name.format(sha256=cells["image_sha256"], row=source.row)
            yield _record(source, image, cells["label"], task)
        except (KeyError, ValueError, IndexError) as error:
            names = f"data.options.name={name!r} may hold {{sha256}} and {{row}}"
            raise DataError(f"{source}: {error!r}: it needs label and image_sha256, and {names}") from error


@reader("countbench")
def read_countbench(path: Path, *, split: str = "", task: str = "count") -> Records:
    """Every row, by its `question`, or by its caption `text` without the number that would give the answer away."""
    for source, cells in rows(path, split, "question", "text"):
        yield _record(source, source, cells.get("question") or _NUMBER.sub("", cells.get("text") or ""), task)


def _record(row: ImageSource, image: ImageSource | str, question: str, task: str) -> Record:
    place = f"row {row.row}"
    return Record(id=place, image=image, question=question, task=task, truth=partial(_truth, row), place=place)


def _truth(source: ImageSource, height: int, width: int, where: str) -> Target:
    row = open_table(source.path, source.split)[source.row]
    number, given = row.get("count", row.get("number")), row.get("points") or []
    if isinstance(given, dict):
        points = np.array([given["x"], given["y"]], np.float64).T
    else:
        points = np.array([(one["x"] * width / 100, one["y"] * height / 100) for one in given]).reshape(-1, 2)
    if number is None or len(points) not in (0, number):
        raise DataError(f"{where}: {len(points)} points, but the count is {number}; leave the row out", "truth")
    if len(points) and (points.min() < -1 or (points > (width + 1, height + 1)).any()):
        raise DataError(f"{where}: a point leaves the {width}x{height} image; is it the picture meant?", "point")
    points = np.clip(points, 0, (width, height)).astype(np.float32)
    number = None if len(points) == number else number
    return Target(boxes=np.zeros((0, 4), np.float32), points=points, number=number)
