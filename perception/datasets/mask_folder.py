"""A folder of pictures and one of masks with the same names: camouflage, saliency, dichotomous segmentation.

`layout` names a published set (mask_folder.yaml): the two folders below `data.train`, and the question. `images`,
`masks` and `question` say otherwise, or all there is to say about a set of your own. Names are compared without
suffixes, and what a file is shows in its content: masks are often JPEGs called .png. A mask whose sides differ by a
pixel is resized (nearest).

`non_cam` asks about COD10K's pictures without a camouflaged object (NonCAM in their names), too: nothing is there.
"""

from functools import partial
from pathlib import Path

import cv2
import numpy as np
import yaml

from perception.datasets import DataError, Record, Records, files, objects, reader
from perception.datasets.mask_files import read_mask
from perception.errors import UserError
from perception.types import ImageSource, Target

_NOTHING = "NonCAM"
LAYOUTS = yaml.safe_load(files.read_text(Path(__file__).with_suffix(".yaml")))


@reader("mask_folder")
def read(
    path: Path, *, layout: str = "", images: str = "", masks: str = "", question: str = "", non_cam: bool = False
) -> Records:
    """Every picture. Raises DataError where a folder holds none, UserError where it is not known which folders."""
    own = {"images": images, "masks": masks, "question": question}
    published = {key: value.format(name=path.name) for key, value in LAYOUTS.get(layout, {}).items()}
    images, masks, question = (own[key] or published.get(key, "") for key in own)
    if not (images and masks and question):
        raise UserError(f"data.options: give layout, one of {', '.join(LAYOUTS)}; or images, masks and question")
    by_name = {file.stem: file for file in files.files_in(path / masks, *files.PICTURES)}
    for file in files.files_in(path / images, *files.PICTURES):
        if non_cam or _NOTHING not in file.stem:
            source, truth = ImageSource(path=str(file.absolute())), partial(file_target, by_name.get(file.stem))
            yield Record(id=file.stem, image=source, question=question, task="segment", truth=truth, place=file.name)


def file_target(file: Path | None, height: int, width: int, where: str) -> Target:
    """The object in a mask's file. Raises DataError where there is none, unless the file's name says so."""
    if file is None:
        raise DataError(f"{where}: no mask of this name; add it, or remove the picture", "mask")
    mask = read_mask(files.read_bytes(file), f"{where}: {file}")
    if max(abs(mask.shape[0] - height), abs(mask.shape[1] - width)) == 1:
        mask = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST).astype(bool)
    if not mask.any() and _NOTHING not in file.stem:
        raise DataError(f"{where}: {file}: the mask has no pixel; mend it, or remove the picture", "mask")
    return objects.mask_target(mask, height, width, f"{where}: {file}")
