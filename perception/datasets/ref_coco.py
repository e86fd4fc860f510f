"""RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO: `refs(unc).p`, `grefs(unc).json` and the like, with `instances.json` beside.

    {"ref_id": 9, "ann_id": 55, "image_id": 123456, "split": "testA", "sentences": [{"sent": "man left"}, ...]}

In gRefCOCO `ann_id` is a list: several objects, or [-1] where nothing is meant. The pictures are those of COCO's
train2014 (`data.images`). An object with an empty segmentation has a box alone. Pickles are read by an unpickler that
makes lists, dictionaries, texts and numbers, and calls nothing.

Published again, told apart by columns and suffix (`ref_coco_tables`):

    lmms-lab/RefCOCO       pictures, `answer` (the sentences), `segmentation` (one flat polygon), `bbox` x y w h
    jxu124/refcoco         `image_path` below `data.images`, `sentences`, `raw_anns` (COCO's annotation, as text)
    Perception-R1, *.json  a list of `image`, `problem`, `normalized_solution`: x1 y1 x2 y2 in 0..1000

`texts` asks with all sentences about an object, as evaluations do, or with the first: one question per object.
"""

import io
import pickle
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from perception import tables
from perception.datasets import DataError, Record, Records, Texts, coco, files, objects, per_text, reader
from perception.types import Box, Target

_COLUMNS = ("answer", "sentences", "segmentation", "raw_anns", "image_path", "bbox")


class Sentence(msgspec.Struct, gc=False):
    sent: str


class Ref(msgspec.Struct, gc=False):
    ref_id: int
    ann_id: int | list[int]
    image_id: int
    split: str
    sentences: list[Sentence]

    @property
    def objects(self) -> list[coco.Id]:
        return [key for key in (self.ann_id if isinstance(self.ann_id, list) else [self.ann_id]) if key != -1]


@reader("ref_coco")
def read(path: Path, *, split: str, texts: Texts = "all", task: str = "segment") -> Records:
    """Every question of the split. Raises DataError where a file is not of this form, or there is no such split."""
    data, file = files.read_bytes(path), path.with_name("instances.json")
    refs = files.parse(list[Ref], data if path.suffix == ".json" else _json(data, path), str(path))
    if split not in (splits := {ref.split for ref in refs}):
        raise DataError(f"{path}: no split {split!r}; set data.options.split to one of {', '.join(sorted(splits))}")
    instances = files.parse(coco.CocoFile, files.read_bytes(file), str(file))
    most = None if texts == "all" else 1
    chosen = [(ref, i, one.sent) for ref in refs if ref.split == split for i, one in enumerate(ref.sentences[:most])]
    asked = [coco.Expression(f"{ref.ref_id}:{i}", ref.image_id, text, ref.objects, task) for ref, i, text in chosen]
    return coco.records(instances, asked, path)


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it calls {module}.{name}")


def _json(pickled: bytes, path: Path) -> bytes:
    try:
        return msgspec.json.encode(_Plain(io.BytesIO(pickled), encoding="latin1").load())
    except Exception as error:  # a damaged pickle raises whatever its last instruction does
        raise DataError(f"{path}: not a list of references ({error}); take the file that RefCOCO publishes") from error


class Grounding(msgspec.Struct):
    image: str
    problem: str
    normalized_solution: Box

    def truth(self, height: int, width: int, where: str) -> Target:
        x1, y1, x2, y2 = (value / 1000 for value in self.normalized_solution)
        box = (x1 * width, y1 * height, x2 * width, y2 * height)
        return objects.target([objects.TrueObject(box=box)], height, width, where)


@reader("ref_coco_tables")
def read_tables(path: Path, *, split: str = "", texts: Texts = "all", task: str = "segment") -> Records:
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
        given = files.parse(coco.Annotation, row["raw_anns"], where)
    else:
        flat = row.get("segmentation")
        given = coco.Annotation(bbox=row.get("bbox"), segmentation=[flat] if flat else None)
    return objects.target([given.object("", height, width, where)], height, width, where)
