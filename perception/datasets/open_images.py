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
from typing import Any

import cv2
import numpy as np

from perception import masks
from perception.datasets import DataError, Records, TrueObject, categories, files, mask_files, reader


@reader("open_images")
def read(
    path: Path, *, classes: str, negatives: str = "", folder: str = "masks", absent: int = 0, task: str = "segment"
) -> Records:
    """Every class in an image, and `absent` of those verified not to be there.

    `classes` and `negatives`: the paths of class-descriptions-boxable.csv, with or without a header, and of the image
    labels. `folder`: where the masks are. Raises DataError for a file that is not of this form.
    """
    if absent and not negatives:
        raise DataError(f"{path}: nothing is known to be absent; set data.options.negatives to the image labels")
    names = dict(row[:2] for row in csv.reader(files.read_text(Path(classes)).splitlines()) if len(row) > 1)
    found: dict[str, dict[str, list[tuple[tuple[Any, ...], bool]]]] = defaultdict(lambda: defaultdict(list))
    none: dict[str, set[str]] = defaultdict(set)
    try:
        for row in _rows(Path(negatives)) if absent else ():
            if float(row["Confidence"]) == 0 and row["LabelName"] in names:
                none[row["ImageID"]].add(names[row["LabelName"]])
        masked = "MaskPath" in next(_rows(path), {})
        for row in _rows(path):
            box = tuple(float(row.get(side) or row[f"Box{side}"]) for side in ("XMin", "YMin", "XMax", "YMax"))
            instance = (*box, row.get("MaskPath")), row.get("IsGroupOf") == "1"
            found[row["ImageID"]][names[row["LabelName"]]].append(instance)
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{path}: {error!r}: no such file, column or class; give the files the reader names") from error
    truth = partial(categories.all_instances, partial(_object, path.parent / folder), not masked)
    for key in dict.fromkeys([*found, *none]):
        yield from categories.ask(key, found.get(key, {}), none[key], absent, truth, image=f"{key}.jpg", task=task)


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def _object(folder: Path, instance: tuple[Any, ...], label: str, height: int, width: int, where: str) -> TrueObject:
    x1, y1, x2, y2, name = instance
    mask = None
    if name:
        try:
            shape = mask_files.read_mask((folder / name).read_bytes(), f"{where}: {name}").astype(np.uint8)
        except OSError as error:
            cure = f"({error.strerror}); set data.options.folder"
            raise DataError(f"{where}: no mask {folder / name} {cure}", "mask") from error
        mask = masks.encode(cv2.resize(shape, (width, height), interpolation=cv2.INTER_NEAREST))
    return TrueObject(box=(x1 * width, y1 * height, x2 * width, y2 * height), mask=mask, label=label)
