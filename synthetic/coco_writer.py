"""Writer of COCO's JSON with a list `expressions`, as `perception.datasets.coco` reads it."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from perception import masks
from perception.datasets.objects import TrueObject
from perception.files import write_text


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
    box, point = [x1, y1, x2 - x1, y2 - y1], [float(value) for value in item.point]
    rle = {"size": [item.mask.height, item.mask.width], "counts": item.mask.counts.decode("ascii")}
    return {"bbox": box, "area": masks.area(item.mask), "iscrowd": 0, "segmentation": rle, "point": point}
