"""COCO-Stuff: a folder of label maps, one PNG per image, in either release, which the values tell apart.

    stuffthingmaps_trainval2017/val2017   category id - 1: things 0..90, stuff 91..181; 255 unlabelled
    stuff_val2017_pixelmaps               category id: stuff 92..182; 183 all things, 0 unlabelled

Which classes are in an image stands only in its map: every map is read once at the start, on all cores. A map does not
tell instances apart: a class is one object, and is not counted. labels.txt has lines as "92: banner". Images by the
map's name and .jpg, from `data.images`.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from perception.datasets import DataError, Records, categories, files, reader
from perception.types import ImageSource

Release = Literal["stuffthingmaps", "pixelmaps"]
_ONLY = {"stuffthingmaps": {*range(1, 92), 255}, "pixelmaps": {182, 183}}
"""Values by which a release is known."""


@reader("coco_stuff")
def read(path: Path, *, labels: str, release: Release | None = None, task: str = "segment", absent: int = 0) -> Records:
    """Every class in an image, and `absent` of those that are in others. `labels`: the path of labels.txt.

    Raises DataError where the maps are of both releases, or of no certain one and `release` does not say which.
    """
    maps = [ImageSource(path=str(file)) for file in files.files_in(path, ".png")]
    with ThreadPoolExecutor() as pool:
        present = list(pool.map(lambda one: np.unique(categories.label_map(one, str(path))).tolist(), maps))
    values = {value for ids in present for value in ids}
    releases = {name for name, only in _ONLY.items() if values & only} | ({release} if release else set())
    if len(releases) != 1:
        why = "of both releases; part them" if releases else "of neither release for certain; set data.options.release"
        raise DataError(f"{path}: {len(maps)} label maps {why}")
    shift, void = (1, 255) if "stuffthingmaps" in releases else (0, 0)
    lines = (line.partition(":") for line in files.read_text(Path(labels)).splitlines())
    names = {int(key) - shift: name.strip() for key, _, name in lines if key.strip().isdigit() and int(key)}
    for source, ids in zip(maps, present, strict=True):
        key, truth = Path(source.path).stem, partial(categories.labelled, source, void, False)
        found = {names[value]: [(value, False)] for value in ids if value in names}
        known = {names[value] for value in values & names.keys()}
        yield from categories.ask(key, found, known, absent, truth, image=f"{key}.jpg", task=task)
