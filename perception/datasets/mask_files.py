"""Masks in image files: what in them is the object is found by looking, not by one threshold."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from perception import images, masks
from perception.datasets.files import find_file, warn_once
from perception.datasets.objects import check_mask_size
from perception.errors import DataError
from perception.types import Rle

_SLACK = 8  # values by which lossy compression parts equal channels
_VOID = 255  # a palette's index of what nobody judged, as the borders in PASCAL VOC


def load_mask(folder: Path, name: str, height: int, width: int, where: str) -> Rle:
    """The mask in a file of the image's size. `where` opens the message of a DataError."""
    path, where = find_file([folder], name), f"{where}: {name}"
    if path is None:
        raise DataError(f"{where}: no such mask file in {folder}; mend the path or add the file", "mask")
    mask = read_mask(path.read_bytes(), where)
    check_mask_size((len(mask), len(mask[0])), height, width, where)
    if not mask.any():
        raise DataError(f"{where}: the mask has no pixel; non-zero pixels are the object", "mask")
    return masks.encode(mask)


def read_mask(data: bytes, where: str) -> np.ndarray:
    """Pixels of the object in an encoded mask: (H, W) bool, none where it is black. Raises DataError.

    two values      the larger one, be they 0 and 1, 0 and 255, or black and a colour
    transparency    where one colour is laid on nothing: the alpha channel decides as a grey mask does
    a palette       of more than two colours: every index but 0 and the void 255
    grey            as JPEG and smooth edges make it: more than half of the largest value, which is said once per file
    """
    try:
        image = images.upright(Image.open(io.BytesIO(data)))
        image.load()
    except images.BROKEN as error:
        raise DataError(f"{where}: not a readable mask ({error}); replace or remove it", "mask") from error
    plane = _plane(image, where)
    low, high = plane.min(), plane.max()
    mask = np.asarray((plane == high) & (plane > 0))
    if (mask | (plane == low)).all():
        return mask
    warn_once(where, "a mask is neither black nor white everywhere; above half of its largest value is the object")
    return np.asarray(plane > high / 2)


def _plane(image: Image.Image, where: str) -> np.ndarray:
    """(H, W): larger values belong to the object."""
    given = np.asarray(image)
    if image.mode == "P" and len(image.getcolors() or ()) > 2:
        return (given != 0) & (given != _VOID)
    if given.ndim == 2 and image.mode != "P":
        return given
    pixels = np.array(image.convert("RGBA"))
    alpha, colours = pixels[..., 3], pixels[..., :3]
    if alpha.min() < alpha.max():
        if np.ptp(colours[alpha > 0], axis=0).max() <= _SLACK:
            return alpha
        colours[alpha == 0] = 0
    dark, bright = colours.min(-1), colours.max(-1)
    two = Image.fromarray(colours).getcolors(2) or ()
    if (bright - dark).max() <= _SLACK or (0, 0, 0) in [colour for _, colour in two]:
        return bright
    if image.mode == "P":
        return given
    choices = "save the object as white on black or as one colour on transparency, or give run lengths"
    raise DataError(f"{where}: a mask of several colours, of which none is known to be the object; {choices}", "mask")
