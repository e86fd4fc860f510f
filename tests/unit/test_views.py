"""Closer views: where they lie, what they show, and that coordinates come back from them unharmed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception import views
from perception.frames import image_to_view, view_arrays_to_image, view_to_image
from perception.types import Answer, AnswerObject, View

MARGIN, SMALLEST, ZOOM = 0.5, 0.25, 1.3
side = st.integers(1, 3000)
number = st.floats(-1e6, 1e6, allow_nan=False)


def look(*boxes: tuple[float, float, float, float], size: tuple[int, int] = (400, 400)) -> views.Rect | None:
    return views.closer_look([AnswerObject(box=box) for box in boxes], *size, MARGIN, SMALLEST, ZOOM)


def test_the_view_is_the_box_with_its_margin() -> None:
    # side 60 with half of it on each side: 120, centred on (130, 170)
    assert look((100, 140, 160, 200)) == (70, 110, 190, 230)


def test_a_view_at_the_edge_is_moved_inside_not_cut() -> None:
    assert look((0, 340, 60, 400)) == (0, 280, 120, 400)


def test_a_tiny_answer_gets_the_smallest_view_and_all_objects_lie_in_one() -> None:
    assert look((200, 200, 200, 200)) == (150, 150, 250, 250)  # a quarter of 400
    assert look((100, 100, 120, 120), (180, 150, 200, 180)) == (50, 40, 250, 240)  # 100 x 80 -> side 200


def test_there_is_no_view_that_shows_no_more_than_the_whole_image() -> None:
    assert look((50, 50, 250, 250)) is None  # side 400: all of it
    assert look((50, 50, 200, 200)) == (0, 0, 300, 300)  # enlarged by 400 / 300 = 1.33
    assert look((50, 50, 205, 205)) is None  # 310: by 1.29


def test_nothing_inside_the_image_is_nothing_to_look_at() -> None:
    assert look() is None
    assert look((500, 0, 600, 100)) is None and look((-50, 0, -1, 10)) is None
    assert views.closer_look([AnswerObject(label="cat")], 400, 400, MARGIN, SMALLEST, ZOOM) is None
    assert look((-1e6, 100, 1e6, 110)) is None  # everything wide, so nothing is enlarged


@given(side, side, st.lists(st.tuples(number, number, number, number), max_size=4))
@settings(max_examples=200)
def test_every_view_has_an_area_inside_the_image(
    height: int, width: int, boxes: list[tuple[float, float, float, float]]
) -> None:
    objects = [AnswerObject(box=(x % width, y % height, u % width, v % height)) for x, y, u, v in boxes]
    rect = views.closer_look([*objects, AnswerObject(box=boxes[0] if boxes else None)], height, width, 0.1, 0.1, ZOOM)
    if rect is None:
        return
    left, top, right, bottom = rect
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert math.sqrt(height * width / ((right - left) * (bottom - top))) >= ZOOM


@given(st.data())
@settings(max_examples=150)
def test_view_and_image_coordinates_round_trip_within_a_pixel(data: st.DataObject) -> None:
    """Answers are written in whole numbers of the view's frame; a frame no coarser than the view loses half a step."""
    left, top = data.draw(st.integers(0, 2000)), data.draw(st.integers(0, 2000))
    wide, tall = data.draw(st.integers(8, 1500)), data.draw(st.integers(8, 1500))
    zoom = data.draw(st.floats(1.0, 8.0))
    view = View(
        left=left,
        top=top,
        right=left + wide,
        bottom=top + tall,
        height=math.ceil(tall * zoom),
        width=math.ceil(wide * zoom),
    )
    x, y = (
        sorted(data.draw(st.tuples(st.floats(0, wide), st.floats(0, wide)))),
        sorted(data.draw(st.tuples(st.floats(0, tall), st.floats(0, tall)))),
    )
    box = (left + x[0], top + y[0], left + x[1], top + y[1])
    answer = Answer(objects=(AnswerObject(box=box, point=(box[0], box[3]), label="it"),))
    (inside,) = image_to_view(answer, view).objects
    assert inside.box is not None and inside.point is not None
    written = AnswerObject(
        box=tuple(round(v) for v in inside.box),  # type: ignore[arg-type]
        point=(round(inside.point[0]), round(inside.point[1])),
        label="it",
    )
    (back,) = view_to_image(Answer(objects=(written,)), view).objects
    assert np.abs(np.subtract(back.box, box)).max() <= 1
    assert np.abs(np.subtract(back.point, (box[0], box[3]))).max() <= 1
    boxes, points = view_arrays_to_image(np.array([written.box]), np.array([written.point]), view)
    np.testing.assert_allclose(boxes[0], back.box)
    np.testing.assert_allclose(points[0], back.point)


def test_coordinates_of_a_known_view() -> None:
    view = View(left=50, top=100, right=150, bottom=150, height=112, width=224)  # 100 x 50 px shown at 224 x 112
    answer = Answer(objects=(AnswerObject(box=(0, 0, 224, 112), point=(112, 56)),))
    (found,) = view_to_image(answer, view).objects
    assert found.box == (50, 100, 150, 150) and found.point == (100, 125)


def test_the_picture_enlarges_the_part_and_outlines_the_mask() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    image[20:40, 60:80] = 200
    mask = np.zeros((100, 100), bool)
    mask[25:35, 65:75] = True
    picture = views.picture(image, (50, 10, 90, 50), mask, 160 * 160)  # 40 px -> 160 px
    assert picture.shape == (160, 160, 3) and picture[80, 80].tolist() == [200, 200, 200]
    assert picture[2, 2].tolist() == [0, 0, 0]
    rows, columns = np.nonzero((picture == views.OUTLINE).all(-1))
    # the mask's edge, (65 - 50) * 4 = 60 and (25 - 10) * 4 = 60, to 99
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (60, 99, 60, 99)
    plain = views.picture(image, (50, 10, 90, 50), None, 160 * 160)
    assert not (plain == views.OUTLINE).all(-1).any() and not np.shares_memory(plain, image)


@pytest.mark.parametrize("rect", [(0, 0, 1, 1), (0, 0, 100, 1), (99, 0, 100, 100)])
def test_even_a_sliver_makes_a_picture(rect: views.Rect) -> None:
    image, empty = np.zeros((100, 100, 3), np.uint8), np.zeros((100, 100), bool)
    picture = views.picture(image, rect, empty, 12544)
    assert picture.shape[:2] == views.picture_size(rect, 12544) and min(picture.shape[:2]) >= 1
