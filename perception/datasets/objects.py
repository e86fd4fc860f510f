"""True objects as a data set gives them, checked against their image and completed into a `Target`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco

from perception import masks
from perception.errors import DataError
from perception.matching import pairwise_iou
from perception.types import Box, Point, Rle, Target

_TOLERANCE = 1.0  # pixels a box or point may lie outside its image; it is clipped
_AGREEMENT = 0.5  # IoU that a box has at least with the box around its mask,
_GRAIN = 3.0  # or pixels by which its sides may differ: of a tiny or thin outline few pixels are drawn
_ROUNDING = 0.01  # of the longer side: a point may lie so far outside its box, as where coordinates were scaled


@dataclass(frozen=True, slots=True, kw_only=True)
class TrueObject:
    """Needs a box or a mask; what is missing follows from the mask, or the point from the box."""

    box: Box | None = None
    point: Point | None = None
    mask: Rle | None = None
    label: str = ""


def target(objects: Sequence[TrueObject], height: int, width: int, where: str, **known: Any) -> Target:
    """The truth about one question on an image of (height, width). `where` opens the message of a DataError.

    `known`: further fields of `Target`, as number, text or ignore.
    """
    with_mask = [item.mask for item in objects if item.mask]
    if with_mask and len(with_mask) < len(objects):
        some = f"{len(with_mask)} of {len(objects)} objects have a mask"
        raise DataError(f"{where}: {some}; give one to all or to none", "truth")
    boxes = [_box(item, height, width, where) for item in objects]
    points = [_point(item, box, height, width, where) for item, box in zip(objects, boxes, strict=True)]
    corners, dots = np.array(boxes, np.float32).reshape(-1, 4), np.array(points, np.float32).reshape(-1, 2)
    labels = tuple(item.label for item in objects) if any(item.label for item in objects) else ()
    return Target(boxes=corners, points=dots, masks=tuple(with_mask), labels=labels, **known)


def mask_target(mask: np.ndarray, height: int, width: int, where: str, **known: Any) -> Target:
    """One object, of (H, W) bool; nothing is there where no pixel is set."""
    check_mask_size(mask.shape, height, width, where)
    objects = [TrueObject(mask=masks.encode(mask))] if mask.any() else []
    return target(objects, height, width, where, **known)


def read_segmentation(value: Any, height: int, width: int, where: str, empty: bool = False) -> Rle:
    """COCO's `segmentation`: polygons, or run-length encoding with counts as text or as a list. Raises DataError.

    `empty`: it may be without a pixel, as where an outline lies between the pixels' centres.
    """
    try:
        mask = _polygons(value, height, width) if isinstance(value, list) else _run_lengths(value)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        why = f"unreadable segmentation ({error!r}); give polygons or run lengths"
        raise DataError(f"{where}: {why}", "mask") from error
    check_mask_size((mask.height, mask.width), height, width, where)
    if not empty and masks.area(mask) == 0:
        raise DataError(f"{where}: the mask has no pixel; remove the object, or mend its segmentation", "mask")
    return mask


def _polygons(value: list[Any], height: int, width: int) -> Rle:
    """Checked here first, since pycocotools reads beyond a polygon that is too short and draws a huge one for hours."""
    polygons = [np.asarray(polygon, np.float64) for polygon in value]
    if not polygons:
        raise ValueError("no polygon")
    for polygon in polygons:
        if polygon.ndim != 1 or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon is x y x y x y ...")
        if not np.abs(polygon).max() <= 2 * max(height, width):
            raise ValueError("a polygon lies far outside the image")
    return masks.from_coco(coco.merge(coco.frPyObjects([polygon.tolist() for polygon in polygons], height, width)))


def _run_lengths(value: dict[str, Any]) -> Rle:
    counts, (height, width) = value["counts"], value["size"]
    if type(height) is not int or type(width) is not int or not (0 < height < 2**16 and 0 < width < 2**16):
        raise ValueError(f"size must be [height, width], got {value['size']}")
    if isinstance(counts, list):
        masks.check_runs(np.array(counts), height, width)
        return masks.from_coco(coco.frPyObjects({"size": [height, width], "counts": counts}, height, width))
    mask = Rle(height=height, width=width, counts=counts.encode("ascii"))
    masks.check_runs(masks.run_lengths(mask.counts), height, width)
    return mask


def check_mask_size(size: tuple[int, ...], height: int, width: int, where: str) -> None:
    if size != (height, width):
        sizes = f"the mask is {'x'.join(map(str, size[::-1]))} but the image {width}x{height}"
        raise DataError(f"{where}: {sizes}; resize the mask", "mask")


def _box(item: TrueObject, height: int, width: int, where: str) -> Box:
    """As it is kept, so that it is checked after clipping and in float32."""
    around = masks.bounding_box(item.mask) if item.mask else None
    if item.box is None:
        if around is None:
            raise DataError(f"{where}: an object has neither box nor mask; give it one", "truth")
        return around
    box = _clipped(item.box, height, width)
    if box is None:
        fault = f"leaves the {width}x{height} image"
    elif not (np.float32(box[0]) < np.float32(box[2]) and np.float32(box[1]) < np.float32(box[3])):
        fault = "is empty; it needs x1 < x2 and y1 < y2"
    elif around and not _agree(box, around):
        fault = f"and its mask, around {_show(around)}, are hardly the same object"
    elif not around and max(item.box) <= 1 < min(height, width):
        fault = "covers one pixel of the corner at most"
    else:
        return box[0], box[1], box[2], box[3]
    fault += _other_meaning(item.box, around, height, width)
    raise DataError(f"{where}: box {_show(item.box)} {fault}; give original pixels", "box")


def _other_meaning(box: Box, around: Box | None, height: int, width: int) -> str:
    """What else the numbers may be, if that fits the image and the box around the mask."""
    given, sides = np.array(box), np.array([width, height, width, height])
    corner = np.array([0, 0, box[0], box[1]])
    meanings = {"shares of the sides": given * sides, "x y width height": given + corner}
    meanings |= {"x1 y1 x2 y2 where x y width height belongs": given - corner, "per mille": given * sides / 1000}
    for meaning, one in meanings.items():
        inside = (one >= 0).all() and (one <= sides).all() and (one[2:] >= one[:2] + 1).all()
        if inside and (around is None or _agree(one, around)):
            return f" (perhaps it is {meaning})"
    return ""


def _agree(box: Sequence[float] | np.ndarray, around: Box) -> bool:
    """A box and the one around its mask; of a tiny object whole pixels may be half as large again as what was drawn."""
    overlap = float(pairwise_iou(np.array([box]), np.array([around]))[0, 0])
    return bool(overlap >= _AGREEMENT or np.abs(np.subtract(box, around)).max() <= _GRAIN)


def _point(item: TrueObject, box: Box, height: int, width: int, where: str) -> Point:
    if item.point is None:
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        return masks.extent(masks.decode(item.mask), cv2.DIST_MASK_PRECISE)[1] if item.mask else middle
    point, slack = _clipped(item.point, height, width), max(_TOLERANCE, _ROUNDING * max(height, width))
    told = f"{where}: point {_show(item.point)}"
    if point is None:
        raise DataError(f"{told} leaves the {width}x{height} image; give original pixels", "point")
    if max(box[0] - point[0], box[1] - point[1], point[0] - box[2], point[1] - box[3]) > slack:
        raise DataError(f"{told} lies outside its box {_show(box)}; give both in one order and frame", "point")
    return point[0], point[1]


def _clipped(values: Sequence[float], height: int, width: int) -> list[float] | None:
    """`values`, x y x y ..., inside the image; None where one is farther outside than the tolerance, or no number."""
    given, limits = np.array(values, np.float64), np.array([width, height] * (len(values) // 2))
    near = ((given >= -_TOLERANCE) & (given <= limits + _TOLERANCE)).all()
    return np.clip(given, 0, limits).tolist() if near else None


def _show(numbers: Sequence[float]) -> str:
    return "[" + ", ".join(f"{number:g}" for number in numbers) + "]"
