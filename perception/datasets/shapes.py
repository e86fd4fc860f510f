"""Shapes as annotation tools draw them -> questions: one per image and label, about all objects of that label.

Shapes of one group are one object. The truth has masks where every object has an outline or a mask; it has boxes where
none is only a point; it always has points.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from perception import masks
from perception.datasets.categories import Instances, ask
from perception.datasets.files import read_bytes
from perception.datasets.objects import TrueObject, read_segmentation, target
from perception.datasets.records import Records, broken
from perception.errors import DataError
from perception.types import ImageSource, Point, Rle, Target


class Shape(NamedTuple):
    """One drawn thing."""

    label: str
    kind: str
    """box (of two or more corners), polygon, point (each is an object) or mask; anything else is refused when drawn."""
    points: Sequence[Point]
    """x y in pixels, or in shares of width and height."""
    group: object = None
    pixels: Callable[[int, int], np.ndarray] | None = None
    """A mask's: (height, width) of the image -> (h, w) bool, the part whose upper left pixel is `points[0]`."""


class Drawn(NamedTuple):
    """What was drawn on an image."""

    image: ImageSource | str
    shapes: Iterable[Shape]
    size: tuple[int, int] = (0, 0)
    """(height, width) as stated; 0: unknown."""
    labels: Collection[str] = ()
    """Those that may be asked for where they are absent."""


def questions(
    path: Path, place: str, task: str, read: Callable[..., Drawn], *given: Any, absent: int = 0, relative: bool = False
) -> Records:
    """A question per label of one image, which `place` names; a broken record where `read(*given)` meets malformed
    content.

    `absent`: so many labels are asked for that are not there. `relative`: points are shares of width and height.
    """
    found: dict[str, list[tuple[Shape, bool]]] = {}
    try:
        drawn = read(*given)
        for shape in drawn.shapes:
            if not shape.label or (shape.kind in ("box", "point") and not shape.points):
                raise ValueError(f"a {shape.kind} without label or coordinates")
            each = [shape._replace(points=[one]) for one in shape.points] if shape.kind == "point" else [shape]
            found.setdefault(str(shape.label), []).extend((one, False) for one in each)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        unreadable = DataError(f"{path}: {place}: the annotation cannot be read ({error!r}); export it again")
        yield broken(place, error if isinstance(error, DataError) else unreadable)
        return
    shared = {"image": drawn.image, "task": task, "size": drawn.size if all(drawn.size) else None}
    yield from ask(place, found, drawn.labels, absent, partial(_truth, relative), **shared)


def _truth(relative: bool, label: str, shapes: Instances, height: int, width: int, where: str) -> Target:
    parts: dict[str, list[Shape]] = {}
    for number, (shape, _) in enumerate(shapes):
        points = [(x * width, y * height) for x, y in shape.points] if relative else shape.points
        key = f"shape {number}" if shape.group is None else f"group {shape.group}"
        parts.setdefault(key, []).append(shape._replace(points=points))
    objects = [_object(own, label, height, width, where) for own in parts.values()]
    if not all(one.mask for one in objects):
        objects = [replace(one, box=masks.bounding_box(one.mask), mask=None) if one.mask else one for one in objects]
    found = target(objects, height, width, where)
    dots = any(all(part.kind == "point" for part in own) for own in parts.values())
    return replace(found, boxes=np.zeros((0, 4), np.float32)) if dots else found


def _object(parts: Sequence[Shape], label: str, height: int, width: int, where: str) -> TrueObject:
    """A point alone gets a box of one pixel, by which it is checked."""
    point = next((part.points[0] for part in parts if part.kind == "point"), None)
    if areas := [_area(part, height, width, where) for part in parts if part.kind not in ("box", "point")]:
        return TrueObject(mask=masks.union(areas, height, width), point=point, label=label)
    x, y = zip(*(xy for part in parts for xy in part.points), strict=True)
    half = 0.0 if any(part.kind == "box" for part in parts) else 0.5
    return TrueObject(box=(min(x) - half, min(y) - half, max(x) + half, max(y) + half), point=point, label=label)


def _area(shape: Shape, height: int, width: int, where: str) -> Rle:
    if shape.kind == "polygon":
        return read_segmentation([np.ravel(shape.points).tolist()], height, width, where)
    if shape.pixels is None:
        raise DataError(f"{where}: a {shape.kind} has no area; draw a polygon, box, point or mask instead", "truth")
    try:
        part, (left, top) = shape.pixels(height, width), map(round, shape.points[0])
        if not part.any():
            raise ValueError("no pixel is set")
        return masks.encode(np.pad(part, ((top, height - top - len(part)), (left, width - left - len(part[0])))))
    except (ArithmeticError, TypeError, ValueError) as error:
        why = f"the mask cannot be read, or leaves the image ({error}); draw it again"
        raise DataError(f"{where}: {why}", "mask") from error


def turned(points: Sequence[Point], about: Point, degrees: float) -> list[Point]:
    """Points after a clockwise turn."""
    (x, y), cos, sin = about, math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [(x + cos * (px - x) - sin * (py - y), y + sin * (px - x) + cos * (py - y)) for px, py in points]


def ellipse(x: float, y: float, across: float, down: float, degrees: float = 0.0) -> list[Point]:
    """Outline around a centre, by two radii: 128 points."""
    angles = [math.pi * one / 64 for one in range(128)]
    return turned([(x + across * math.cos(one), y + down * math.sin(one)) for one in angles], (x, y), degrees)


def rectangle(label: str, box: Sequence[float], about: Point, degrees: float, group: object = None) -> Shape:
    """A box x1 y1 x2 y2; a turned one is a polygon."""
    x1, y1, x2, y2 = box
    corners = turned([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], about, degrees)
    return Shape(label, "polygon" if degrees else "box", corners, group)


def read_xml(path: Path) -> ElementTree.Element:
    """The root of an XML file. Raises DataError, for a file that could declare entities, too."""
    data = read_bytes(path)
    try:
        if b"<!DOCTYPE" in data:
            raise ElementTree.ParseError("a document type is declared, as no annotation tool does")
        return ElementTree.fromstring(data, ElementTree.XMLParser(encoding="utf-8"))  # no encoding hides a declaration
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: not valid XML ({error}); export it again") from error
