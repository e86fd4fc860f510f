"""Your own data: one question about one image per line of a JSONL file.

    {"image": "street.jpg", "question": "the red car", "boxes": [[12, 30, 80, 95]], "mask": "street_car.png"}
    {"image": "street.jpg", "question": "how many people", "task": "count", "boxes": [[5, 8, 20, 60], [40, 9, 55, 62]]}
    {"image": "street.jpg", "question": "the blue bus", "boxes": []}

image     path relative to the JSONL file, or to a folder `images/` beside it; as displayed (EXIF orientation applied)
question  what to find, in words
boxes     list of [x1, y1, x2, y2] in pixels of the image; [] says that nothing is there. May be left out with `mask`
points    optional: one [x, y] inside each object. Default: deepest point of the mask, else the centre of the box
mask      optional: one per box (or just one, not in a list): the path of a mask file of the image's size, best black
          and white (`mask_files`), or COCO run-length encoding {"size": [height, width], "counts": text or list}
task      what is asked for: an entry of the settings' `task`, as segment (default), ground or count
id        optional, unique. Default: file name and line number
"""

from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import msgspec

from perception.datasets import DataError, Record, Records, TrueObject, broken, files, read_segmentation, reader, target
from perception.datasets.mask_files import load_mask
from perception.types import Rle, Target

_NAMES = {"bbox": "boxes", "bbox_2d": "boxes", "box": "boxes", "point_2d": "points", "segmentation": "mask"}
_NAMES |= {name: name for name in ("boxes", "points", "mask", "task")}


class Line(msgspec.Struct, gc=False):
    image: str
    question: Annotated[str, msgspec.Meta(min_length=1)]
    boxes: list[tuple[float, float, float, float]] | None = None
    points: list[tuple[float, float]] | None = None
    mask: str | dict[str, Any] | list[str | dict[str, Any]] | None = None
    task: str = "segment"
    id: str | int | None = None


@reader("jsonl")
def read(path: Path) -> Records:
    """Every line. One that cannot be read is a broken record."""
    for number, text in enumerate(files.read_bytes(path).split(b"\n"), start=1):
        if not text.strip():
            continue
        key, where = f"{path.stem}:{number}", f"{path}: line {number}"
        try:
            line, keys = files.parse(Line, text, where), files.parse(dict[str, msgspec.Raw], text, where)
            for written in keys:
                if (meant := _meant(written)) and meant not in keys:
                    raise DataError(f"{where}: unknown key {written!r}; did you mean {meant!r}?")
        except DataError as error:
            yield broken(key, error)
            continue
        name, place = str(key if line.id is None else line.id), f"line {number}"
        truth = partial(_truth, line, path.parent)
        yield Record(id=name, image=line.image, question=line.question, task=line.task, truth=truth, place=place)


@cache
def _meant(key: str) -> str | None:
    """The optional field that a key stands for; under a wrong name it would be left out in silence."""
    near = get_close_matches(key.lower(), _NAMES, 1, 0.8)
    return _NAMES[near[0]] if near else None


def _truth(line: Line, folder: Path, height: int, width: int, where: str) -> Target:
    if line.boxes is None and line.mask is None:
        raise DataError(f'{where}: neither boxes nor mask; give one ("boxes": [] says that nothing is there)', "truth")
    given = line.mask if isinstance(line.mask, list) else [line.mask] if line.mask is not None else None
    count = len(line.boxes if line.boxes is not None else given or [])
    for name, values in (("mask", given), ("points", line.points)):
        if values is not None and len(values) != count:
            what = f"{len(values)} in {name} for {count} objects"
            raise DataError(f"{where}: {what}; give one for each, or leave it out", "truth")
    masks = [_mask(one, folder, height, width, where) for one in given or ()]
    parts = [one or [None] * count for one in (line.boxes, line.points, masks)]
    objects = [TrueObject(box=box, point=point, mask=mask) for box, point, mask in zip(*parts, strict=True)]
    return target(objects, height, width, where)


def _mask(value: str | dict[str, Any], folder: Path, height: int, width: int, where: str) -> Rle:
    if isinstance(value, dict):
        return read_segmentation(value, height, width, where)
    return load_mask(folder, value, height, width, where)
