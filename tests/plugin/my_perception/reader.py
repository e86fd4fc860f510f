"""Reader `piped`: one question per line, `image<delimiter>question<delimiter>x1 y1 x2 y2`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from perception.datasets import reader
from perception.datasets.files import Images, read_text
from perception.datasets.objects import TrueObject, target
from perception.types import Sample


@reader("piped")
def read(
    path: Path, images: Images, *, delimiter: str = "|", unit: Literal["pixel", "share"] = "pixel"
) -> Iterator[Sample]:
    """`unit`: boxes are in pixels, or in shares of the image's width and height."""
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        name, question, corners = line.split(delimiter)
        file, height, width = images.find(name, f"{path}:{number}")
        scale = (width, height, width, height) if unit == "share" else (1, 1, 1, 1)
        x1, y1, x2, y2 = (float(value) * by for value, by in zip(corners.split(), scale, strict=True))
        yield Sample(
            id=str(number),
            image_path=str(file),
            height=height,
            width=width,
            question=question,
            task="corners",
            target=target([TrueObject(box=(x1, y1, x2, y2))], height, width, f"{path}:{number}"),
        )
