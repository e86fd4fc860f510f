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
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, FiniteFloat

from perception import masks
from perception.datasets import reader
from perception.datasets.files import Images, parse, read_text
from perception.datasets.objects import TrueObject, read_segmentation, target
from perception.errors import DataError
from perception.files import write_text
from perception.types import Sample

Id = int | str


class Image(BaseModel):
    id: Id
    file_name: str
    height: int | None = None
    width: int | None = None


class Annotation(BaseModel):
    id: Id
    image_id: Id
    category_id: Id | None = None
    bbox: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat] | None = None
    segmentation: Any = None  # read only where an expression uses it
    point: tuple[FiniteFloat, FiniteFloat] | None = None


class Category(BaseModel):
    id: Id
    name: str


class Expression(BaseModel):
    id: Id
    image_id: Id
    question: str = Field(min_length=1)
    task: str = "segment"
    annotation_ids: list[Id]


class CocoFile(BaseModel):
    images: list[Image]
    annotations: list[Annotation]
    categories: list[Category] = []
    expressions: list[Expression]


Entry = TypeVar("Entry", Image, Annotation, Category, Expression)


@reader("coco")
def read(path: Path, images: Images) -> Iterator[Sample]:
    """Every expression as a Sample. Raises DataError naming file and id for the first that cannot be used."""
    data = parse(CocoFile, read_text(path), str(path))
    entries, annotations = _index(data.images, path), _index(data.annotations, path)
    categories = _index(data.categories, path)
    _index(data.expressions, path)
    for expression in data.expressions:
        where = f"{path}: expression {expression.id}"
        image = entries.get(expression.image_id)
        if image is None:
            raise DataError(f"{where}: no image has id {expression.image_id}; add it or mend image_id")
        image_path, height, width = images.find(image.file_name, where)
        if (image.height or height, image.width or width) != (height, width):
            raise DataError(
                f"{where}: {image.file_name} is {width}x{height} but the JSON says {image.width}x{image.height}; "
                "one of them was resized"
            )
        objects = []
        for key in expression.annotation_ids:
            annotation = annotations.get(key)
            if annotation is None or annotation.image_id != image.id:
                raise DataError(f"{where}: image {image.id} has no annotation {key}; mend annotation_ids")
            category = categories.get(annotation.category_id) if annotation.category_id is not None else None
            objects.append(_object(annotation, category, height, width, f"{path}: annotation {key}"))
        yield Sample(
            id=str(expression.id),
            image_path=str(image_path),
            height=height,
            width=width,
            question=expression.question,
            task=expression.task,
            target=target(objects, height, width, where),
        )


def _index(entries: Sequence[Entry], path: Path) -> dict[Id, Entry]:
    index: dict[Id, Entry] = {}
    for entry in entries:
        if entry.id in index:
            raise DataError(f"{path}: two {type(entry).__name__.lower()} entries have id {entry.id}; make ids unique")
        index[entry.id] = entry
    return index


def _object(annotation: Annotation, category: Category | None, height: int, width: int, where: str) -> TrueObject:
    box = None
    if annotation.bbox is not None:
        x, y, box_width, box_height = annotation.bbox
        box = (x, y, x + box_width, y + box_height)
    has_mask = annotation.segmentation not in (None, [])
    return TrueObject(
        box=box,
        point=annotation.point,
        mask=read_segmentation(annotation.segmentation, height, width, where) if has_mask else None,
        label=category.name if category else "",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One image, one question and its true objects, to be written."""

    image: bytes
    """An encoded PNG."""
    height: int
    width: int
    question: str
    task: str
    objects: Sequence[TrueObject]
    """Each with box, point and mask."""


def write(path: Path, records: Iterable[Record]) -> int:
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
