"""Reader `piped`: one question per line, `image<delimiter>question<delimiter>x1 y1 x2 y2`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from perception.datasets import reader
from perception.datasets.files import read_text
from perception.datasets.objects import TrueObject, target
from perception.datasets.records import Record
from perception.types import Target


@reader("piped")
def read(path: Path, *, delimiter: str = "|", unit: Literal["pixel", "share"] = "pixel") -> Iterator[Record]:
    """`unit`: boxes are in pixels, or in shares of the image's width and height."""
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        name, question, corners = line.split(delimiter)
        yield Record(
            id=str(number),
            image=name,
            question=question,
            task="corners",
            truth=partial(_truth, corners, unit),
            place=f"line {number}",
        )


def _truth(corners: str, unit: str, height: int, width: int, where: str) -> Target:
    scale = (width, height, width, height) if unit == "share" else (1, 1, 1, 1)
    x1, y1, x2, y2 = (float(value) * by for value, by in zip(corners.split(), scale, strict=True))
    return target([TrueObject(box=(x1, y1, x2, y2))], height, width, where)
