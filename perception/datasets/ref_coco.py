"""RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO: `refs(unc).p`, `grefs(unc).json` and the like, with `instances.json` beside.

    {"ref_id": 9, "ann_id": 55, "image_id": 123456, "split": "testA", "sentences": [{"sent": "man left"}, ...]}

In gRefCOCO `ann_id` is a list: several objects, or [-1] where nothing is meant. The pictures are those of COCO's
train2014 (`data.images`). An object with an empty segmentation has a box alone. Pickles are read by an unpickler that
makes lists, dictionaries, texts and numbers, and calls nothing.

`texts` asks with all sentences about an object, as evaluations do, or with the first: one question per object.
"""

import io
import pickle
from pathlib import Path
from typing import NoReturn

import msgspec

from perception.datasets import DataError, Records, Texts, coco, files, reader


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
