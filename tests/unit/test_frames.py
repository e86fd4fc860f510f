"""Guards the one place that converts coordinates: conversions are exact and invertible."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from perception.frames import METRIC, Frame, convert_boxes, convert_points, view_to_image
from perception.types import Answer, AnswerObject, View

sides = st.integers(1, 4000)
frames = st.builds(Frame, sides, sides)


THOUSAND = Frame(1000, 1000)


def test_worked_example() -> None:
    # 480x640 -> the policy sees 476x644; its (322, 238) is the centre of the image in every frame.
    assert smart_resize(480, 640, 28, 56 * 56, 28 * 28 * 1280) == (476, 644)
    original, resized = Frame(480, 640), Frame(476, 644)
    centre = np.array([[322, 238]])
    assert convert_points(centre, resized, original).tolist() == [[320, 240]]
    assert convert_points(centre, resized, METRIC).tolist() == [[420, 420]]
    assert convert_points(centre, resized, THOUSAND).tolist() == [[500, 500]]
    assert convert_boxes(np.array([[0, 0, 320, 120]]), original, METRIC).tolist() == [[0, 0, 420, 210]]


@settings(max_examples=60)
@given(source=frames, target=frames, box=st.lists(st.floats(0, 4000), min_size=4, max_size=4))
def test_there_and_back_is_the_same_place(source: Frame, target: Frame, box: list[float]) -> None:
    boxes = np.array([box])
    back = convert_boxes(convert_boxes(boxes, source, target), target, source)
    np.testing.assert_allclose(back, boxes, rtol=1e-14, atol=1e-300)
    assert (convert_boxes(boxes, source, source) == boxes).all()


@settings(max_examples=60)
@given(source=frames, target=frames, numbers=st.lists(st.floats(0, 4000), min_size=6, max_size=6))
def test_answers_convert_as_arrays_do(source: Frame, target: Frame, numbers: list[float]) -> None:
    x1, y1, x2, y2, x, y = numbers
    answer = Answer(objects=(AnswerObject(box=(x1, y1, x2, y2), label="cat"), AnswerObject(point=(x, y))))
    shown = View(left=0, top=0, right=target.width, bottom=target.height, height=source.height, width=source.width)
    converted = view_to_image(answer, shown)
    first, second = converted.objects
    assert first.box == tuple(convert_boxes(np.array([numbers[:4]]), source, target)[0])
    assert second.point == tuple(convert_points(np.array([[x, y]]), source, target)[0])
    assert (first.point, first.label, second.box) == (None, "cat", None)


def test_empty_arrays_keep_their_width() -> None:
    assert convert_boxes(np.empty((0, 4)), METRIC, THOUSAND).shape == (0, 4)
    assert convert_points(np.empty((0, 2)), METRIC, THOUSAND).shape == (0, 2)


def test_a_frame_without_area_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        Frame(0, 10)
