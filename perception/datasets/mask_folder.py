"""A folder of pictures and one of masks with the same names: camouflage, saliency, dichotomous segmentation.

`layout` names a published set: the two folders below `data.train`, and the question. `images`, `masks` and `question`
say otherwise, or all there is to say about a set of your own. Names are compared without suffixes, and what a file is
shows in its content: masks are often JPEGs called .png. A mask whose sides differ by a pixel is resized (nearest).

`non_cam` asks about COD10K's pictures without a camouflaged object (NonCAM in their names), too: nothing is there.
"""

from functools import partial
from pathlib import Path

import cv2
import numpy as np

from perception.datasets import DataError, Record, Records, files, objects, reader
from perception.datasets.mask_files import read_mask
from perception.errors import UserError
from perception.types import ImageSource, Target

_HIDDEN, _SALIENT, _NOTHING = "the camouflaged object", "the salient object", "NonCAM"
LAYOUTS = {
    "cod10k_v3": ("Image", "GT_Object", _HIDDEN),  # COD10K-v3/Train
    "camouflage": ("Imgs", "GT", _HIDDEN),  # as SINet packed CAMO, CHAMELEON, COD10K, NC4K and TrainDataset
    "camo": (".", "../../GT", _HIDDEN),  # CAMO-V.1.0-CVIU2019/Images/Train: its masks are all in one folder
    "duts": ("{name}-Image", "{name}-Mask", _SALIENT),  # DUTS-TR
    "dut_omron": ("DUT-OMRON-image", "pixelwiseGT-new-PNG", _SALIENT),
    "hku_is": ("imgs", "gt", _SALIENT),
    "ecssd": ("images", "ground_truth_mask", _SALIENT),
    "dis5k": ("im", "gt", "the main object"),  # DIS5K/DIS-TR
}
"""Folder of the pictures, of the masks, question. {name} is the name of the folder above."""


@reader("mask_folder")
def read(
    path: Path, *, layout: str = "", images: str = "", masks: str = "", question: str = "", non_cam: bool = False
) -> Records:
    """Every picture. Raises DataError where a folder holds none, UserError where it is not known which folders."""
    given = zip((images, masks, question), LAYOUTS.get(layout, ("", "", "")), strict=True)
    images, masks, question = (own or published.format(name=path.name) for own, published in given)
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
