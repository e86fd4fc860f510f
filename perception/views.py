"""Closer views for a second look: the part of an image around an answer, and the picture of it.

All rectangles are in pixels of the original image. The picture has about `pixels` pixels whatever the part's size, so a
small part is enlarged; the provisional mask is outlined in it.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np

from perception.types import AnswerObject, Box, Rect

OUTLINE = (255, 0, 255)
"""Magenta: rare in photographs."""


def closer_look(
    objects: Sequence[AnswerObject], height: int, width: int, margin: float, smallest: float, min_zoom: float
) -> Rect | None:
    """The square around everything answered (original pixels) with `margin` times its longer side on every side.

    Its side is at least `smallest` times the image's shorter side; where it would leave the image it is moved back in,
    and cut where it is longer than the image. None where nothing is answered inside the image, or where the part is so
    large that it would be enlarged by less than `min_zoom`. A box or point that covers no area is looked at like any
    other: the square around it still has an area.
    """
    corners = [_corners(item, height, width) for item in objects]
    inside = np.array([found for found in corners if found is not None]).reshape(-1, 4)
    if not len(inside):
        return None
    (left, top), (right, bottom) = inside[:, :2].min(0), inside[:, 2:].max(0)
    side = max(max(right - left, bottom - top) * (1 + 2 * margin), smallest * min(height, width), 1.0)
    left, right = _span((left + right) / 2, side, width)
    top, bottom = _span((top + bottom) / 2, side, height)
    if math.sqrt(height * width / ((right - left) * (bottom - top))) < min_zoom:
        return None
    return left, top, right, bottom


def picture_size(rect: Rect, pixels: int) -> tuple[int, int]:
    """(height, width) of the view's picture: the rectangle's shape, about `pixels` pixels, at least one each way."""
    left, top, right, bottom = rect
    scale = math.sqrt(pixels / ((right - left) * (bottom - top)))
    return max(1, round((bottom - top) * scale)), max(1, round((right - left) * scale))


def picture(image: np.ndarray, rect: Rect, outline: np.ndarray | None, pixels: int) -> np.ndarray:
    """The view as the policy is shown it: (h, w, 3) uint8. `outline` is an (H, W) bool mask of the whole image."""
    left, top, right, bottom = rect
    height, width = picture_size(rect, pixels)
    enlarges = height * width > (bottom - top) * (right - left)
    how = cv2.INTER_CUBIC if enlarges else cv2.INTER_AREA
    shown = cv2.resize(image[top:bottom, left:right], (width, height), interpolation=how)
    if outline is not None:
        part = outline[top:bottom, left:right].astype(np.uint8)
        part = cv2.resize(part, (width, height), interpolation=cv2.INTER_NEAREST)
        contours, _ = cv2.findContours(part, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(shown, contours, -1, OUTLINE, max(1, round(math.sqrt(height * width) / 224)))
    return shown


def _corners(item: AnswerObject, height: int, width: int) -> Box | None:
    """The box around the part of the object that lies in the image."""
    found = item.box or ((*item.point, *item.point) if item.point else None)
    if found is None or found[0] >= width or found[1] >= height or found[2] < 0 or found[3] < 0:
        return None
    return max(0.0, found[0]), max(0.0, found[1]), min(float(width), found[2]), min(float(height), found[3])


def _span(middle: float, side: float, limit: int) -> tuple[int, int]:
    length = min(limit, math.ceil(side))
    start = min(max(0, round(middle - length / 2)), limit - length)
    return start, start + length
