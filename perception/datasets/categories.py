"""Questions about the categories of an image, one each: what COCO, LVIS, panoptic, COCO-Stuff and Open Images share.

An instance is whatever its reader makes an object of, and whether its pixels are judged neither way: a crowd.
"""

import io
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from perception import images, masks
from perception.datasets.objects import TrueObject, check_mask_size, target
from perception.datasets.records import Record, Records
from perception.errors import DataError
from perception.types import Box, ImageSource, Rle, Target

Instances = Sequence[tuple[Any, bool]]
Found = Mapping[str, Instances]
Frame = tuple[int, int, str]
"""(height, width) of the image and the beginning of messages."""


def ask(
    key: int | str, found: Found, candidates: Collection[str], absent: int, truth: Callable[..., Target], **shared: Any
) -> Records:
    """A question for each category that is not there as a crowd alone, and for `absent` candidates that are not found.

    `key` is the image's id, by which the absent ones are drawn; `truth` is given the category's name and instances, and
    the frame; `shared` are the records' other fields.
    """
    missing = sorted(set(candidates) - found.keys()) if absent else []
    chosen = Random(str(key)).sample(missing, min(absent, len(missing)))
    for name in [*(name for name, group in found.items() if not all(crowd for _, crowd in group)), *chosen]:
        asked = partial(truth, name, found.get(name, ()))
        yield Record(id=f"{key}:{name}", question=name, truth=asked, place=f"image {key}, {name}", **shared)


def all_instances(
    read: Callable[..., TrueObject], complete: bool, name: str, instances: Instances, *frame: *Frame
) -> Target:
    """The truth, where `read` makes an instance an object; a crowd without a mask is all of its box.

    One whose mask is without a pixel is left out. Raises DataError where that is all there is.
    """
    given = [(read(instance, name, *frame), crowd) for instance, crowd in instances]
    items = [(item, crowd) for item, crowd in given if item.mask is None or masks.area(item.mask)]
    if given and all(crowd for _, crowd in items):
        raise DataError(f"{frame[2]}: no mask of it has a pixel; leave it out", "mask")
    crowds = [item.mask or _rectangle(item.box, *frame[:2]) for item, crowd in items if crowd]
    ignore = masks.union(crowds, *frame[:2]) if crowds else None
    objects = [item for item, crowd in items if not crowd]
    return target(objects, *frame, complete=(complete or not items) and not crowds, ignore=ignore)


def labelled(source: ImageSource, void: int, counted: bool, name: str, instances: Instances, *frame: *Frame) -> Target:
    """The truth, where an instance is an id in the label map at `source`; pixels of id `void` are ignored."""
    height, width, where = frame
    ids = label_map(source, where)
    check_mask_size(ids.shape, height, width, f"{where}: {source}")
    wanted, crowds = ([key for key, crowd in instances if crowd is which] for which in (False, True))
    if missing := set(wanted) - set(np.unique(ids).tolist()):
        raise DataError(f"{where}: {source} has no pixel of {min(missing)}; it belongs to another file", "mask")
    objects = [TrueObject(mask=masks.encode(ids == key), label=name) for key in wanted]
    ignored = np.isin(ids, [void, *crowds])
    ignore = masks.encode(ignored) if ignored.any() else None
    return target(objects, *frame, complete=not crowds and (counted or not wanted), ignore=ignore)


def label_map(source: ImageSource, where: str) -> np.ndarray:
    """(H, W) ids: the values of an 8-bit picture, or R + 256 G + 65536 B. Raises DataError."""
    try:
        with Image.open(io.BytesIO(images.read(source))) as opened:
            values = np.asarray(opened)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{where}: {source} cannot be read as a label map ({error}); copy it again", "mask") from error
    return values if values.ndim == 2 else values[..., :3] @ np.array([1, 256, 65536])


def _rectangle(box: Box | None, height: int, width: int) -> Rle:
    """The pixels that a box touches."""
    mask, (x1, y1, x2, y2) = np.zeros((height, width), bool), np.clip(box or (0,) * 4, 0, None)
    mask[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))] = True
    return masks.encode(mask)
