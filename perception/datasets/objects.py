"""True objects as a data set gives them, checked against their image and completed into a `Target`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco

from perception import masks
from perception.errors import DataError
from perception.types import Box, Point, Rle, Target

_TOLERANCE = 1.0  # pixels a box or point may lie outside its image; it is clipped


@dataclass(frozen=True, slots=True, kw_only=True)
class TrueObject:
    """Needs a box or a mask; what is missing follows from the mask, or the point from the box."""

    box: Box | None = None
    point: Point | None = None
    mask: Rle | None = None
    label: str = ""


def target(objects: Sequence[TrueObject], height: int, width: int, where: str) -> Target:
    """The truth about one question on an image of (height, width). `where` opens the message of a DataError."""
    with_mask = [item.mask for item in objects if item.mask]
    if with_mask and len(with_mask) < len(objects):
        raise DataError(
            f"{where}: {len(with_mask)} of {len(objects)} objects have a mask; give one to all or to none", "truth"
        )
    boxes = [_box(item, height, width, where) for item in objects]
    points = [_point(item, box, height, width, where) for item, box in zip(objects, boxes, strict=True)]
    labels = tuple(item.label for item in objects)
    return Target(
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        points=np.array(points, np.float32).reshape(-1, 2),
        masks=tuple(with_mask),
        labels=labels if any(labels) else (),
    )


def read_segmentation(value: Any, height: int, width: int, where: str) -> Rle:
    """COCO's `segmentation`: polygons, or run-length encoding with counts as text or as a list. Raises DataError."""
    try:
        mask = _polygons(value, height, width) if isinstance(value, list) else _run_lengths(value)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        why = f"unreadable segmentation ({error!r}); give polygons or run lengths"
        raise DataError(f"{where}: {why}", "mask") from error
    check_mask_size((mask.height, mask.width), height, width, where)
    if masks.area(mask) == 0:
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


def check_mask_size(size: tuple[int, int], height: int, width: int, where: str) -> None:
    if size != (height, width):
        sizes = f"the mask is {size[1]}x{size[0]} but the image {width}x{height}"
        raise DataError(f"{where}: {sizes}; resize the mask", "mask")


def _box(item: TrueObject, height: int, width: int, where: str) -> Box:
    if item.box is None:
        if item.mask is None:
            raise DataError(f"{where}: an object has neither box nor mask; give it one", "truth")
        return masks.bounding_box(item.mask)
    x1, y1, x2, y2 = _inside("box", item.box, height, width, where)
    if not (x1 < x2 and y1 < y2):
        raise DataError(f"{where}: box {_show(item.box)} is empty; it needs x1 < x2 and y1 < y2", "box")
    return x1, y1, x2, y2


def _point(item: TrueObject, box: Box, height: int, width: int, where: str) -> Point:
    if item.point is None:
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        return masks.extent(masks.decode(item.mask), cv2.DIST_MASK_PRECISE)[1] if item.mask else middle
    x, y = _inside("point", item.point, height, width, where)
    return x, y


def _inside(what: str, values: Sequence[float], height: int, width: int, where: str) -> list[float]:
    """`values`, x y x y ..., clipped and in float32, as they are kept. Raises DataError where one lies farther outside
    the image than the tolerance."""
    given, limits = np.array(values, np.float32), np.array([width, height] * (len(values) // 2), np.float32)
    if not ((given >= -_TOLERANCE) & (given <= limits + _TOLERANCE)).all():  # NaN is not inside
        raise DataError(
            f"{where}: {what} {_show(values)} leaves the {width}x{height} image; give original pixels", what
        )
    return np.clip(given, 0, limits).tolist()


def _show(numbers: Sequence[float]) -> str:
    return "[" + ", ".join(f"{number:g}" for number in numbers) + "]"
