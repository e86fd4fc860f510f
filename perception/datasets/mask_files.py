"""Masks in image files."""

import io
from collections.abc import Collection

import numpy as np
from PIL import Image

from perception.errors import DataError


def read_mask(data: bytes, where: str, ids: Collection[int] | None = None) -> np.ndarray:
    """(H, W) bool: brighter than half of the maximum. Raises DataError."""
    try:
        grey = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    except OSError as error:
        raise DataError(f"{where}: the mask does not decode ({error})", "mask") from error
    return grey > int(grey.max()) / 2
