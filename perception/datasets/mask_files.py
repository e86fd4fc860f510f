"""Masks in image files."""

import io

import numpy as np
from PIL import Image

from perception.errors import DataError


def read_mask(data: bytes, where: str) -> np.ndarray:
    """(H, W) bool: brighter than half of the maximum. Raises DataError."""
    try:
        grey = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    except OSError as error:
        raise DataError(f"{where}: not a readable mask ({error}); replace or remove it", "mask") from error
    return grey > grey.max() / 2
