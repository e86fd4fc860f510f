"""RefCOCO, RefCOCO+ and RefCOCOg as they were published again, told apart by columns and suffix:

    lmms-lab/RefCOCO       pictures, `answer` (the sentences), `segmentation` (one flat polygon), `bbox` x y w h
    jxu124/refcoco         `image_path` below `data.images`, `sentences`, `raw_anns` (COCO's annotation, as text)
    Perception-R1, *.json  a list of `image`, `problem`, `normalized_solution`: x1 y1 x2 y2 in 0..1000

`texts` asks with all sentences about an object, or with the first: one question per object.
"""

from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from perception import tables
from perception.datasets import Record, Records, Texts, coco, files, objects, per_text, reader
from perception.types import Box, Target

_COLUMNS = ("answer", "sentences", "segmentation", "raw_anns", "image_path", "bbox")


class Grounding(msgspec.Struct):
    image: str
    problem: str
    normalized_solution: Box

    def truth(self, height: int, width: int, where: str) -> Target:
        x1, y1, x2, y2 = (value / 1000 for value in self.normalized_solution)
        box = (x1 * width, y1 * height, x2 * width, y2 * height)
        return objects.target([objects.TrueObject(box=box)], height, width, where)


class Annotation(coco.Annotation):
    image_id: coco.Id = 0


@reader("ref_coco_tables")
def read(path: Path, *, split: str = "", texts: Texts = "all", task: str = "segment") -> Records:
    """Every question of a table or a JSON file. Raises DataError where it is of another form."""
    if path.suffix == ".json":
        for number, one in enumerate(files.parse(list[Grounding], files.read_bytes(path), str(path))):
            place = f"row {number}"
            yield Record(id=place, image=one.image, question=one.problem, task=task, truth=one.truth, place=place)
        return
    for source, row in tables.rows(path, split, *_COLUMNS):
        image, place = row.get("image_path", source), f"row {source.row}"
        asked = row.get("answer") or [one["sent"] for one in row.get("sentences", ())]
        yield from per_text(asked, texts, place, image=image, task=task, truth=partial(_truth, row), place=place)


def _truth(row: dict[str, Any], height: int, width: int, where: str) -> Target:
    if "raw_anns" in row:
        given = files.parse(Annotation, row["raw_anns"], where)
    else:
        flat = row.get("segmentation")
        given = Annotation(bbox=row.get("bbox"), segmentation=[flat] if flat else None)
    return objects.target([given.object("", height, width, where)], height, width, where)
