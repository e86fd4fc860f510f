"""Binary masks as COCO run-length encodings (pycocotools). Sets of pixels, never decoded to compare them."""

from collections.abc import Sequence

import cv2
import numpy as np
from pycocotools import mask as coco

from perception.types import Box, Rect, Rle


def encode(mask: np.ndarray) -> Rle:
    """(H, W) of bool or 0/1 -> RLE. Raises ValueError for any other shape."""
    if mask.ndim != 2:
        raise ValueError(f"a mask has two axes, got shape {mask.shape}")
    return from_coco(coco.encode(np.asfortranarray(mask.astype(bool), dtype=np.uint8)))


def decode(rle: Rle) -> np.ndarray:
    """RLE -> (H, W) bool."""
    return np.ascontiguousarray(coco.decode(to_coco(rle))).astype(bool)


def area(rle: Rle) -> int:
    """Pixels set."""
    return int(coco.area(to_coco(rle)))


def bounding_box(rle: Rle) -> Box:
    """x1 y1 x2 y2 around the pixels set, x2 and y2 exclusive; all zero for an empty mask."""
    x, y, width, height = coco.toBbox(to_coco(rle)).tolist()
    return x, y, x + width, y + height


def extent(mask: np.ndarray, precision: int = cv2.DIST_MASK_3) -> tuple[Rect, tuple[int, int]]:
    """Box around the pixels set in (H, W) bool, and x y of the one farthest from the mask's edge or the image's border.

    That pixel is the centre of the largest inscribed circle, as exactly as OpenCV's distance mask `precision` has it.
    """
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    crop = np.pad(mask[top : top + height, left : left + width].astype(np.uint8), 1)
    distance = cv2.distanceTransform(crop, cv2.DIST_L2, precision)
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return (left, top, left + width, top + height), (left + int(x) - 1, top + int(y) - 1)


def union(masks: Sequence[Rle], height: int, width: int) -> Rle:
    """Pixels in any of the masks; the empty mask of this size when there is none."""
    if not masks:
        return encode(np.zeros((height, width), bool))
    return from_coco(coco.merge([to_coco(mask) for mask in masks]))


def run_lengths(counts: bytes) -> np.ndarray:
    """Runs of 0, 1, 0, ... pixels, column by column, from COCO's compressed text: (R,) int64.

    The text holds signed numbers of 5 bits a character, least significant first (bit 5: more follows); from the fourth
    on, each is the difference to the run two before. Raises ValueError where it breaks off or holds other characters.
    """
    digits = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        raise ValueError("the run-length text is damaged")
    last = np.flatnonzero(digits & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    size = last - first + 1
    if size.max() > 7:
        raise ValueError("the run-length text holds a number beyond 32 bits")
    place = np.arange(len(digits)) - np.repeat(first, size)
    numbers = np.add.reduceat((digits & 31) << 5 * place, first)
    numbers -= np.where(digits[last] & 16, 1 << 5 * size, 0)
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers


def check_runs(runs: np.ndarray, height: int, width: int) -> None:
    """Raises ValueError unless the runs cover the image exactly: pycocotools itself would write beyond its end."""
    pixels = height * width
    whole = runs.ndim == 1 and runs.dtype.kind == "i" and runs.min(initial=0) >= 0 and runs.max(initial=0) <= pixels
    if not whole or int(runs.sum()) != pixels:
        raise ValueError(f"the runs do not add up to {height} x {width} pixels")


def to_coco(rle: Rle) -> dict:
    """The dictionary pycocotools works on."""
    return {"size": [rle.height, rle.width], "counts": rle.counts}


def from_coco(encoded: dict) -> Rle:
    """From pycocotools' compressed dictionary."""
    height, width = encoded["size"]
    return Rle(height=int(height), width=int(width), counts=encoded["counts"])
