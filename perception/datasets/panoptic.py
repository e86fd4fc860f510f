"""COCO panoptic, and COCONut: every pixel belongs to a thing, to stuff, or to nothing (id 0, judged neither way).

`panoptic_val2017.json` with `panoptic_val2017/*.png` beside it, where a segment's id is R + 256 G + 65536 B; or a table
whose rows hold `mask`, `segments_info` and `image_info`, as COCONut has it. Images by `file_name`, from `data.images`.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from perception.datasets import DataError, Records, broken, categories, coco, files, reader
from perception.tables import rows
from perception.types import ImageSource


class Segment(msgspec.Struct, gc=False):
    id: int
    category_id: coco.Id
    iscrowd: bool = False


class Annotation(msgspec.Struct):
    image_id: coco.Id
    segments_info: list[Segment]


class Row(msgspec.Struct):
    image_info: coco.Image
    segments_info: Annotation


class PanopticFile(msgspec.Struct):
    categories: list[coco.Category]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []

    def rows(self, folder: Path) -> Iterator[tuple[ImageSource, dict[str, Any]]]:
        """As a table has them."""
        images = {image.get("id"): image for image in self.images}
        for one in self.annotations:
            picture = ImageSource(path=str(folder / str(one.get("file_name"))), column="mask")
            yield picture, {"image_info": images.get(one.get("image_id")), "segments_info": one}


@reader("panoptic")
def read(path: Path, *, task: str = "segment", absent: int = 0, split: str = "", names: str = "") -> Records:
    """Every category in an image with all its segments, except where it is there as a crowd alone; `absent` others.

    `names`: for a table, a JSON file with COCO's list `categories`, whose names the table lacks.
    """
    if path.suffix != ".json" and not names:
        raise DataError(f"{path}: a table without names; set data.options.names to a JSON file with `categories`")
    described = path if path.suffix == ".json" else Path(names)
    data = files.parse(PanopticFile, files.read_bytes(described), str(described))
    named = {category.id: category.name for category in data.categories}
    table = path != described
    for source, cells in rows(path, split, *Row.__struct_fields__) if table else data.rows(path.with_suffix("")):
        found: dict[str, list[tuple[int, bool]]] = defaultdict(list)
        try:
            row = msgspec.convert(cells, Row, strict=False)
            for one in row.segments_info.segments_info:
                found[named[one.category_id]].append((one.id, one.iscrowd))
        except (msgspec.ValidationError, KeyError) as error:
            cure = "add the image or category that it names, or mend the field"
            yield broken(str(source), DataError(f"{path}: {source}: {error!r}; {cure}"))
            continue
        truth = partial(categories.labelled, replace(source, column="mask"), 0, True)
        key, shared = row.segments_info.image_id, row.image_info.described()
        yield from categories.ask(key, found, named.values(), absent, truth, task=task, **shared)
