"""COCO format with referring expressions: read it, and write it.

The standard JSON (`images`, `annotations`, `categories`) plus a list `expressions`, one per question:

    {"id": 7, "image_id": 3, "question": "the red circle", "task": "segment", "annotation_ids": [12]}

`annotation_ids` may be empty: nothing is there. An annotation's `segmentation` is a list of polygons or run-length
encoding, its `bbox` is [x, y, width, height]; either may be missing. A key `point` [x, y] inside the object is
optional; the default is the centre of the largest inscribed circle. Image names are relative to the JSON file or to
`images/` beside it.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from perception import masks
from perception.datasets import reader
from perception.datasets.files import parse, read_bytes
from perception.datasets.objects import TrueObject, read_segmentation, target
from perception.datasets.records import Record
from perception.errors import DataError
from perception.files import write_text
from perception.types import Target

Id = int | str


class Image(msgspec.Struct, gc=False):
    id: Id
    file_name: str
    height: int | None = None
    width: int | None = None


class Annotation(msgspec.Struct, gc=False):
    id: Id
    image_id: Id
    category_id: Id | None = None
    bbox: tuple[float, float, float, float] | None = None
    segmentation: msgspec.Raw = msgspec.Raw(b"null")  # read only where an expression uses it
    point: tuple[float, float] | None = None


class Category(msgspec.Struct, gc=False):
    id: Id
    name: str


class Expression(msgspec.Struct, gc=False):
    id: Id
    image_id: Id
    question: Annotated[str, msgspec.Meta(min_length=1)]
    annotation_ids: list[Id]
    task: str = "segment"


class CocoFile(msgspec.Struct):
    images: list[Image]
    annotations: list[Annotation]
    expressions: list[Expression]
    categories: list[Category] = []


Entry = TypeVar("Entry", Image, Annotation, Category)


@reader("coco")
def read(path: Path) -> Iterator[Record]:
    """Every expression. Raises DataError where the file is not of this form or an id stands twice."""
    return records(parse(CocoFile, read_bytes(path), str(path)), path)


def records(data: CocoFile, path: Path) -> Iterator[Record]:
    """Every expression of `data`, which was read from `path`. Raises DataError where an id stands twice."""
    images, annotations = _index(data.images, path), _index(data.annotations, path)
    names = {key: one.name for key, one in _index(data.categories, path).items()}
    for expression in data.expressions:
        image = images.get(expression.image_id)
        height, width = (image.height, image.width) if image else (None, None)
        yield Record(
            id=str(expression.id),
            image=image.file_name if image else "",
            question=expression.question,
            task=expression.task,
            truth=partial(_truth, expression, annotations, names),
            place=f"expression {expression.id}",
            size=(height, width) if height and width else None,
            fault=None if image else _no_image(path, expression),
        )


def _no_image(path: Path, expression: Expression) -> DataError:
    where = f"{path}: expression {expression.id}"
    return DataError(f"{where}: no image has id {expression.image_id}; add it or mend image_id")


def _index(entries: Sequence[Entry], path: Path) -> dict[Id, Entry]:
    index = {entry.id: entry for entry in entries}
    if len(index) < len(entries):
        kind = type(entries[0]).__name__.lower()
        twice = next(entry.id for entry in entries if index[entry.id] is not entry)
        raise DataError(f"{path}: two {kind} entries have id {twice}; make ids unique")
    return index


def _truth(
    expression: Expression,
    annotations: dict[Id, Annotation],
    names: dict[Id, str],
    height: int,
    width: int,
    where: str,
) -> Target:
    objects = []
    for key in expression.annotation_ids:
        annotation = annotations.get(key)
        if annotation is None or annotation.image_id != expression.image_id:
            raise DataError(
                f"{where}: image {expression.image_id} has no annotation {key}; mend annotation_ids", "truth"
            )
        objects.append(_object(annotation, names, height, width, f"{where}, annotation {key}"))
    return target(objects, height, width, where)


def _object(annotation: Annotation, names: dict[Id, str], height: int, width: int, where: str) -> TrueObject:
    box = None
    if annotation.bbox is not None:
        x, y, box_width, box_height = annotation.bbox
        box = (x, y, x + box_width, y + box_height)
    segmentation = parse(object, bytes(annotation.segmentation), where)
    has_mask = segmentation not in (None, [])
    return TrueObject(
        box=box,
        point=annotation.point,
        mask=read_segmentation(segmentation, height, width, where) if has_mask else None,
        label=names.get(annotation.category_id, "") if annotation.category_id is not None else "",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One image, one question and its true objects, to be written."""

    image: bytes
    """An encoded PNG."""
    height: int
    width: int
    question: str
    task: str
    objects: Sequence[TrueObject]
    """Each with box, point and mask."""


def write(path: Path, records: Iterable[Scene]) -> int:
    """Write `path` (JSON) and the images into a folder beside it named like it; returns the number of records.

    Images are written as they come. The JSON appears last and whole, so that a broken-off write is never read.
    """
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    document: dict[str, list[dict]] = {"images": [], "annotations": [], "categories": [], "expressions": []}
    annotations = document["annotations"]
    categories: dict[str, int] = {}
    for index, record in enumerate(records, start=1):
        name = f"{folder.name}/{index:07d}.png"
        (path.parent / name).write_bytes(record.image)
        document["images"].append({"id": index, "file_name": name, "height": record.height, "width": record.width})
        ids = range(len(annotations) + 1, len(annotations) + 1 + len(record.objects))
        for key, item in zip(ids, record.objects, strict=True):
            category = categories.setdefault(item.label, len(categories) + 1)
            annotations.append({"id": key, "image_id": index, "category_id": category, **_annotation(item)})
        expression = {"id": index, "image_id": index, "question": record.question, "task": record.task}
        document["expressions"].append(expression | {"annotation_ids": list(ids)})
    document["categories"] = [{"id": key, "name": name} for name, key in categories.items()]
    write_text(path, json.dumps(document))
    return len(document["expressions"])


def _annotation(item: TrueObject) -> dict:
    assert item.mask is not None and item.box is not None and item.point is not None, "a record's objects are whole"
    x1, y1, x2, y2 = map(float, item.box)
    return {
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": masks.area(item.mask),
        "iscrowd": 0,
        "segmentation": {"size": [item.mask.height, item.mask.width], "counts": item.mask.counts.decode("ascii")},
        "point": [float(value) for value in item.point],
    }
