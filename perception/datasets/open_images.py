"""Open Images: boxes (`*-annotations-bbox.csv`) or masks (`*-annotations-object-segmentation.csv`), all in 0..1.

A box of a group (`IsGroupOf`) is ignored, and its class is not counted; nor is a class of which masks are given, since
not every box has one. Absent is only what people verified to be (`*-annotations-human-imagelabels.csv`, Confidence 0).
Boxes are of the most specific class: a man is not listed as a person, too. Images by ImageID, from `data.images`.
"""

import csv
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from perception import masks
from perception.datasets import reader
from perception.datasets.categories import all_instances, ask
from perception.datasets.files import read_bytes, read_text
from perception.datasets.mask_files import read_mask
from perception.datasets.objects import TrueObject
from perception.datasets.records import Record
from perception.errors import DataError


@reader("open_images")
def read(
    path: Path, *, classes: str, negatives: str = "", folder: str = "masks", absent: int = 0, task: str = "segment"
) -> Iterator[Record]:
    """Every class in an image, and `absent` of those verified not to be there.

    `classes` and `negatives`: the paths of class-descriptions-boxable.csv, with or without a header, and of the image
    labels. `folder`: where the masks are. Raises DataError for a file that is not of this form.
    """
    names = dict(row[:2] for row in csv.reader(read_text(Path(classes)).splitlines()) if len(row) > 1)
    found: dict[str, dict[str, list[tuple[tuple[str, ...], bool]]]] = defaultdict(lambda: defaultdict(list))
    none: dict[str, set[str]] = defaultdict(set)
    try:
        for row in csv.DictReader(read_text(Path(negatives)).splitlines()) if absent else ():
            if float(row["Confidence"]) == 0 and row["LabelName"] in names:
                none[row["ImageID"]].add(names[row["LabelName"]])
        lines = csv.DictReader(read_text(path).splitlines())
        masked = "MaskPath" in (lines.fieldnames or ())
        sides = [f"{'Box' if masked else ''}{side}" for side in ("XMin", "YMin", "XMax", "YMax")]
        for row in lines:
            instance = (*(row[side] for side in sides), row.get("MaskPath", ""))
            found[row["ImageID"]][names[row["LabelName"]]].append((instance, row.get("IsGroupOf") == "1"))
    except (KeyError, ValueError) as error:
        raise DataError(f"{path}: no column or class {error}; are the CSV files those the reader names?") from error
    truth = partial(all_instances, partial(_object, path.parent / folder), not masked)
    for key in dict.fromkeys([*found, *none]):
        yield from ask(key, found.get(key, {}), none[key], absent, truth, image=f"{key}.jpg", task=task)


def _object(folder: Path, instance: tuple[str, ...], label: str, height: int, width: int, where: str) -> TrueObject:
    *sides, name = instance
    x1, y1, x2, y2 = map(float, sides)
    box, mask = (x1 * width, y1 * height, x2 * width, y2 * height), None
    if name:
        whole = read_mask(read_bytes(folder / name), f"{where}: {name}").astype(np.uint8)
        mask = masks.encode(cv2.resize(whole, (width, height), interpolation=cv2.INTER_NEAREST) > 0)
    return TrueObject(box=box, mask=mask, label=label)
