"""Coordinate frames, and the one place that converts between them.

A frame is the size of the plane coordinates are measured in: the original image, the image as the policy's processor
resized it (Qwen2.5-VL answers there), 0..1000 (Qwen3-VL), or the 840x840 square in which the published thresholds are
stated. Converting scales each axis by the ratio of the sizes; nothing is rounded or clipped.
"""

from dataclasses import dataclass, replace

import numpy as np

from perception.types import Answer, AnswerObject, Point, View


@dataclass(frozen=True, slots=True)
class Frame:
    height: float
    width: float

    def __post_init__(self) -> None:
        if not (self.height > 0 and self.width > 0):
            raise ValueError(f"a frame needs positive sides, got {self.height} x {self.width}")


METRIC = Frame(840, 840)
"""Where Dr. Seg's and VisionReasoner's pixel thresholds hold."""


def convert_boxes(boxes: np.ndarray, source: Frame, target: Frame) -> np.ndarray:
    """(N, 4) x1 y1 x2 y2 in `source` -> (N, 4) float64 in `target`."""
    corners = np.asarray(boxes, np.float64).reshape(-1, 2, 2)
    return (corners * _scale(source, target)).reshape(-1, 4)


def convert_points(points: np.ndarray, source: Frame, target: Frame) -> np.ndarray:
    """(N, 2) x y in `source` -> (N, 2) float64 in `target`."""
    return np.asarray(points, np.float64).reshape(-1, 2) * _scale(source, target)


def convert_answer(answer: Answer, source: Frame, target: Frame) -> Answer:
    """The same answer, its boxes and points measured in `target`."""
    return _mapped(answer, _scale(source, target), np.zeros(2))


def view_to_image(answer: Answer, view: View) -> Answer:
    """An answer about a view, in its own frame -> original pixels."""
    return _mapped(answer, _scale(Frame(view.height, view.width), _extent(view)), np.array([view.left, view.top]))


def view_arrays_to_image(boxes: np.ndarray, points: np.ndarray, view: View) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (N, 4) and points (N, 2) in the view's frame -> original pixels."""
    frame, corner = Frame(view.height, view.width), np.array([view.left, view.top], np.float64)
    moved = convert_boxes(boxes, frame, _extent(view)) + np.tile(corner, 2)
    return moved, convert_points(points, frame, _extent(view)) + corner


def image_to_view(answer: Answer, view: View) -> Answer:
    """An answer in original pixels -> the view's own frame."""
    near = _mapped(answer, np.ones(2), -np.array([view.left, view.top]))
    return convert_answer(near, _extent(view), Frame(view.height, view.width))


def _extent(view: View) -> Frame:
    return Frame(view.bottom - view.top, view.right - view.left)


def _scale(source: Frame, target: Frame) -> np.ndarray:
    return np.array([target.width / source.width, target.height / source.height])


def _mapped(answer: Answer, scale: np.ndarray, shift: np.ndarray) -> Answer:
    """Every x and y times `scale` plus `shift`, each (2,)."""
    (x, y), (right, down) = scale.tolist(), shift.tolist()

    def moved(point: Point) -> Point:
        return point[0] * x + right, point[1] * y + down

    def mapped(item: AnswerObject) -> AnswerObject:
        box = (*moved(item.box[:2]), *moved(item.box[2:])) if item.box else None
        further, background = (tuple(map(moved, points)) for points in (item.further, item.background))
        point = moved(item.point) if item.point else None
        return replace(item, box=box, point=point, further=further, background=background)

    return replace(answer, objects=tuple(map(mapped, answer.objects)))


PIXEL_LIMITS = ("shortest_edge", "longest_edge")
"""Names that Qwen-VL's image processors give to the fewest and the most pixels of a resized image."""
