"""Pixels, masks and boxes in the forms a page can hold: data: URIs, SVG paths, corners with sizes."""

import base64
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from perception import images, masks
from perception.errors import DataError
from perception.types import Rle

MAX_SIDE = 448
"""Larger images are shown smaller; overlays keep the original's coordinates."""
_LOSSLESS_SIDE = 256

Box = tuple[float, float, float, float]
"""x, y, width, height."""
Point = tuple[float, float]


def corner_and_size(boxes: Sequence[Sequence[float]]) -> tuple[Box, ...]:
    """Boxes given by two corners."""
    return tuple((x1, y1, max(0.0, x2 - x1), max(0.0, y2 - y1)) for x1, y1, x2, y2 in boxes)


def mask_of(counts: str, height: int, width: int) -> np.ndarray:
    """(height, width) bool from run-length text."""
    return masks.decode(Rle(height=height, width=width, counts=counts.encode("ascii")))


def outline(mask: np.ndarray) -> str:
    """SVG path along the edges of a mask, holes included (fill-rule evenodd)."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    # A contour runs through pixel centres; a pixel's centre lies at +0.5.
    lines = ("L".join(f"{x + 0.5:g} {y + 0.5:g}" for x, y in contour.reshape(-1, 2).tolist()) for contour in contours)
    return "".join(f"M{line}Z" for line in lines)


def decoded(picture: Path | None, height: int, width: int) -> np.ndarray | None:
    """(height, width, 3) RGB of an image that was stored no larger than needed; None where it cannot be read."""
    try:
        image = images.decode(picture.read_bytes()) if picture else None
    except (DataError, OSError):
        return None
    return image if image is None or image.shape[:2] == (height, width) else cv2.resize(image, (width, height))


def data_uri(image: np.ndarray) -> str:
    """(H, W, 3) uint8 RGB, made smaller where it is large."""
    scale = MAX_SIDE / max(image.shape[:2])
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    small = max(image.shape[:2]) <= _LOSSLESS_SIDE
    kind, options = ("png", []) if small else ("webp", [cv2.IMWRITE_WEBP_QUALITY, 82])
    _, data = cv2.imencode(f".{kind}", image[..., ::-1], options)
    return f"data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode('ascii')}"
