"""Guards what is certainly wrong about boxes, points and keys: refused in one line, with the likely cause."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from launch.run.samples import Check
from perception import masks
from perception.datasets.objects import TrueObject, target
from perception.errors import DataError
from perception.types import Target
from tests import builders
from tests.builders import dataset, rectangle

H, W = 480, 640


def one(box: tuple | None = None, mask: tuple | None = None, point: tuple | None = None) -> Target:
    """The truth of one object; the mask is the rectangle x1 y1 x2 y2."""
    shape = masks.encode(rectangle(*mask, H, W)) if mask else None
    return target([TrueObject(box=box, mask=shape, point=point)], H, W, "here")


def refused(**given: Any) -> tuple[str, str]:
    with pytest.raises(DataError) as caught:
        one(**given)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("here: ")
    return str(caught.value), caught.value.reason


edge = st.floats(-1.5, W + 1.5) | st.sampled_from([-1, -1e-9, 0, 1e-30, W - 1e-9, W, W + 1e-9, H - 1e-9, H, W + 1])


@given(st.tuples(edge, edge, edge, edge))
def test_a_box_that_is_taken_has_an_area_inside_its_image(box: tuple[float, float, float, float]) -> None:
    try:
        found = one(box=box)
    except DataError:
        return
    x1, y1, x2, y2 = found.boxes[0].tolist()
    assert 0 <= x1 < x2 <= W and 0 <= y1 < y2 <= H
    assert np.abs(found.boxes[0] - box).max() <= 1.001
    x, y = found.points[0].tolist()
    assert x1 <= x <= x2 and y1 <= y <= y2


@given(st.tuples(edge, edge))
def test_a_point_that_is_taken_lies_inside_its_image(point: tuple[float, float]) -> None:
    with suppress(DataError):
        x, y = one(box=(0, 0, W, H), point=point).points[0].tolist()
        assert 0 <= x <= W and 0 <= y <= H


@pytest.mark.parametrize(
    "box", [(W, 5, W + 1, 50), (-1, 5, 0, 50), (5, H - 1e-9, 50, H + 1), (3, 3, 3 + 1e-9, 9), (5, -1, 50, -0.5)]
)
def test_what_clipping_and_rounding_leave_empty_is_refused(box: tuple) -> None:
    said, reason = refused(box=box)
    assert "is empty; it needs x1 < x2 and y1 < y2" in said and reason == "box"


TRUE = (300, 200, 420, 440)  # x1 y1 x2 y2


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        ((300, 200, 120, 240), "x y width height"),
        ((300, 200, 720, 640), "x1 y1 x2 y2 where x y width height belongs"),  # converted once too often
        ((468.75, 416.67, 656.25, 916.67), "per mille"),
        ((0.46875, 0.41667, 0.65625, 0.91667), "shares of the sides"),
    ],
)
@pytest.mark.parametrize("mask", [TRUE, (310, 190, 400, 430)])
def test_a_box_beside_its_mask_tells_what_it_is(given: tuple, mask: tuple, cause: str) -> None:
    said, reason = refused(box=given, mask=mask)
    assert f"(perhaps it is {cause}); give original pixels" in said and reason == "box"


def test_a_box_and_a_mask_of_two_objects() -> None:
    said, _ = refused(box=(10, 20, 60, 80), mask=TRUE)
    assert said == (
        "here: box [10, 20, 60, 80] and its mask, around [300, 200, 420, 440], are hardly the same object; "
        "give original pixels"
    )


@pytest.mark.parametrize("box", [TRUE, (290, 190, 430, 450), (300, 200, 420, 330)])
def test_a_box_may_be_looser_or_tighter_than_its_mask(box: tuple) -> None:
    """The last covers 120 x 130 of 120 x 240 pixels: IoU .54."""
    assert one(box=box, mask=TRUE).boxes.tolist() == [list(box)]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((300, 200, 120, 240), "is empty; it needs x1 < x2 and y1 < y2 (perhaps it is x y width height)"),
        ((468, 416, 656, 916), "leaves the 640x480 image (perhaps it is per mille)"),
        ((300, 200, 720, 640), "leaves the 640x480 image (perhaps it is x1 y1 x2 y2 where x y width height belongs)"),
        ((0.1, 0.2, 0.5, 0.75), "covers one pixel of the corner at most (perhaps it is shares of the sides)"),
        ((0, 0, 1, 1), "covers one pixel of the corner at most (perhaps it is shares of the sides)"),
        ((3000, 20, 3500, 90), "leaves the 640x480 image; give original pixels"),
        ((500, 20, 300, 10), "is empty; it needs x1 < x2 and y1 < y2; give original pixels"),
    ],
)
def test_a_box_alone_is_refused_where_it_cannot_be_right(given: tuple, says: str) -> None:
    said, reason = refused(box=given)
    assert says in said and reason == "box"


@pytest.mark.parametrize("box", [(0, 0, 1, 2), (0, 0, 1.5, 1), (100, 100, 900 * W / 1000, 400)])
def test_what_could_be_right_is_taken(box: tuple) -> None:
    assert one(box=box).count == 1


@pytest.mark.parametrize("box", [(10.6, 20.3, 11.2, 21.4), (10.1, 20.8, 11.9, 21.1), (9.5, 19.2, 12.4, 22.9)])
def test_a_tiny_box_is_drawn_between_the_pixels_of_its_mask(box: tuple) -> None:
    """COCO's boxes are those of the polygons. IoU with the mask's pixels: .17, .14, .37."""
    assert one(box=box, mask=(10, 20, 12, 22)).count == 1


def test_one_pixel_with_its_mask_is_an_object() -> None:
    assert one(box=(0, 0, 1, 1), mask=(0, 0, 1, 1)).boxes.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("point", "fits"), [((300, 200), True), ((296, 444), True), ((292, 300), False), ((5, 5), False)]
)
def test_a_point_lies_in_its_box_but_for_rounding(point: tuple, fits: bool) -> None:
    if fits:
        assert one(box=TRUE, point=point).points.tolist() == [list(point)]
    else:
        said, reason = refused(box=TRUE, point=point)
        assert "lies outside its box [300, 200, 420, 440]; give both in one order and frame" in said
        assert reason == "point"


# ---------------------------------------------------------------- keys of a JSONL line


def line(folder: Path, **keys: Any) -> Path:
    path = folder / "keys.jsonl"
    path.write_text(json.dumps({"image": "a.png", "question": "q"} | keys))
    return path


@pytest.mark.parametrize(
    ("keys", "wrong", "meant"),
    [
        ({"mask": "mask.png", "bbox": [[1, 2, 3, 4]]}, "bbox", "boxes"),
        ({"mask": "mask.png", "Boxes": [[1, 2, 3, 4]]}, "Boxes", "boxes"),
        ({"mask": "mask.png", "bboxes": [[1, 2, 3, 4]]}, "bboxes", "boxes"),
        ({"mask": "mask.png", "bbox_2d": [[1, 2, 3, 4]]}, "bbox_2d", "boxes"),
        ({"boxes": [[1, 2, 3, 4]], "masks": "mask.png"}, "masks", "mask"),
        ({"boxes": [[1, 2, 3, 4]], "segmentation": {}}, "segmentation", "mask"),
        ({"boxes": [[1, 2, 3, 4]], "point": [[2, 3]]}, "point", "points"),
        ({"boxes": [[1, 2, 3, 4]], "Task": "count"}, "Task", "task"),
    ],
)
def test_a_key_that_nearly_matches_is_refused(folder: Path, keys: dict, wrong: str, meant: str) -> None:
    with pytest.raises(DataError, match=f"line 1: unknown key '{wrong}'; did you mean '{meant}'"):
        dataset(line(folder, **keys))[0]


def test_keys_of_ones_own_are_left_alone(folder: Path) -> None:
    own = {"source": "web", "tags": ["x"], "category": 3, "image_id": 7, "bbox": [1], "width": 30, "label": "car"}
    assert dataset(line(folder, boxes=[[1, 2, 3, 4]], **own))[0].target.count == 1


# ---------------------------------------------------------------- how many objects


@pytest.mark.parametrize("count", [120, 121, 4096, 4097])
def test_a_question_has_as_many_objects_as_an_answer_may(folder: Path, count: int) -> None:
    data = dataset(line(folder, boxes=[[1, 2, 3, 4]] * count))
    if count <= 4096:
        assert len(data[0].target.boxes) == count
    else:
        with pytest.raises(DataError, match="line 1: 4097 objects, more than the 4096 of an answer") as caught:
            data[0]
        assert caught.value.reason == "truth"


# ---------------------------------------------------------------- images of a shape that no processor takes


@pytest.mark.parametrize("size", [(14, 2800), (14, 2801), (2800, 14), (2801, 14)])
def test_an_image_may_be_200_times_as_long_as_wide(size: tuple[int, int]) -> None:
    shown = SimpleNamespace(
        tokens=lambda sample, inline: (7, 7, 9),
        image_token_id=9,
        image_tokens=lambda height, width: math.prod(smart_resize(height, width, 28, 56**2, 28**2 * 128)) // 28**2,
    )
    check = Check(builders.config(), shown, {"segment": (frozenset(), "")})  # type: ignore[arg-type]
    with pytest.raises(DataError, match="crop it") if 2801 in size else nullcontext() as caught:
        check(builders.sample(height=size[0], width=size[1]))
    if caught:
        assert "the image does not fit the policy's processor (absolute aspect ratio must" in str(caught.value)
        assert caught.value.reason == "size"
