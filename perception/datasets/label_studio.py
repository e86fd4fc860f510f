"""Label Studio: its JSON or JSON-MIN export. Polygons, ellipses, turned rectangles and brushes are masks, rectangles
boxes, keypoints points. Of several annotations of a task the first that was not cancelled counts; predictions do not.

`image` is the key of the data that names the picture. An upload or URL is looked for by its file name, a local file
(`?d=...`) by its path below `data.images`.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from perception.datasets import Records, parse, read_bytes, reader
from perception.datasets.shapes import Drawn, Shape, ellipse, questions, rectangle

Json = dict[str, Any]


@reader("label_studio")
def read(path: Path, *, image: str = "image", task: str = "segment") -> Records:
    """Every label of every task. Raises DataError where the file is no list of tasks."""
    tasks: dict[str, Json] = {}
    for number, one in enumerate(parse(list[Json], read_bytes(path), str(path)), start=1):
        tasks.setdefault(f"task {one.get('id', number)}", one)  # JSON-MIN repeats it for each annotator
    for place, one in tasks.items():
        yield from questions(path, place, task, _drawn, one, image)


def _drawn(task: Json, image: str) -> Drawn:
    regions = list(_regions(task))
    size = (regions[0]["original_height"], regions[0]["original_width"]) if regions else (0, 0)
    url = urlsplit(task.get("data", task)[image])
    local = url.query.startswith("d=") or not (url.scheme or url.path.startswith("/"))
    name = unquote(url.query[2:] or url.path) if local else unquote(url.path).rpartition("/")[2]
    return Drawn(name, [shape for one in regions for shape in _shapes(one)], size)


def _regions(task: Json) -> Iterator[Json]:
    """Each region as JSON-MIN has it: what was drawn, its labels and the image's size in one dictionary."""
    if "annotations" in task:
        whole = [one["result"] for one in task["annotations"] if not one.get("was_cancelled")]
        found = [one | one.get("value", {}) for one in (whole or [[]])[0]]
    else:
        found = [one for value in task.values() if isinstance(value, list) for one in value if isinstance(one, dict)]
    return (one for one in found if "original_width" in one)


def _shapes(region: Json) -> Iterator[Shape]:
    """One for every label. Percent of width and height become pixels."""
    if region.get("image_rotation"):
        raise ValueError("the image was turned in Label Studio; turn its file instead")
    width, height, turn = region["original_width"] / 100, region["original_height"] / 100, region.get("rotation") or 0
    x, y = region.get("x", 0) * width, region.get("y", 0) * height
    for label in (label for key, labels in region.items() if key.endswith("labels") for label in labels):
        if "rle" in region:
            yield Shape(label, "mask", [(0, 0)], None, partial(_pixels, region["rle"]))
        elif "points" in region:
            yield Shape(label, "polygon", [(x * width, y * height) for x, y in region["points"]])
        elif "radiusX" in region:
            yield Shape(label, "polygon", ellipse(x, y, region["radiusX"] * width, region["radiusY"] * height, turn))
        elif "height" in region:
            box = (x, y, x + region["width"] * width, y + region["height"] * height)
            yield rectangle(label, box, (x, y), turn)
        else:
            yield Shape(label, "point" if "x" in region else "path", [(x, y)])


def _pixels(rle: Sequence[int], height: int, width: int) -> np.ndarray:
    """A brush's RGBA picture, row by row, as @thi.ng/rle-pack packs it; the object is where alpha is at least half.

    32 bits: number of values; 5: bits of a value, less 1; 4 times 4: bits of a length, less 1. Then blocks: a bit that
    says whether one value is repeated, 2 bits that choose the length's size, the length less 1, the value or values.
    Raises ValueError where it is damaged.
    """
    bits, at = bin(int.from_bytes(b"\1" + bytes(rle)))[3:], 0

    def take(count: int) -> int:
        nonlocal at
        at += count
        return int(bits[at - count : at], 2)

    if (total := take(32)) != height * width * 4 or take(5) + 1 != 8:
        raise ValueError(f"{total} values are not the {width}x{height}x4 bytes of the image")
    sizes, values, done = [take(4) + 1 for _ in range(4)], np.zeros(total, np.uint8), 0
    while done < total:
        repeated, length = take(1), take(sizes[take(2)]) + 1
        values[done : done + length] = take(8) if repeated else [take(8) for _ in range(length)]
        done += length
    return values.reshape(height, width, 4)[..., 3] > 127
