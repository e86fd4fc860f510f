"""Guards masks in image files: the object is found whatever the format, the values and the compression."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from perception.datasets.mask_files import load_mask, read_mask
from perception.errors import DataError
from perception.masks import decode

H, W = 96, 128
SHAPE = cv2.ellipse(np.zeros((H, W), np.uint8), (70, 40), (41, 23), 20, 0, 360, 1, -1).astype(bool)
PAIRS = [(0, 1), (0, 255), (0, 128), (0, 7), (1, 255), (3, 4)]
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0] + [9] * (252 * 3) + [224, 224, 192]


def encoded(image: Image.Image, form: str = "PNG", **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **how)
    return buffer.getvalue()


def grey(low: int = 0, high: int = 255) -> np.ndarray:
    return np.where(SHAPE, high, low).astype(np.uint8)


def palette(index: np.ndarray, colours: list[int]) -> Image.Image:
    image = Image.fromarray(index.astype(np.uint8), "P")
    image.putpalette(colours)
    return image


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "TGA"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
def test_of_two_values_the_larger_is_the_object(form: str, mode: str, pair: tuple[int, int]) -> None:
    if (form, mode) in {("BMP", "LA"), ("PPM", "LA"), ("PPM", "RGBA"), ("GIF", "RGBA")}:
        return  # what Pillow does not write, or quantises
    data = encoded(Image.fromarray(grey(*pair)).convert(mode), form, **({"lossless": True} if form == "WEBP" else {}))
    assert (read_mask(data, "here") == SHAPE).all()


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "GIF", "PPM"])
def test_one_bit(form: str) -> None:
    assert (read_mask(encoded(Image.fromarray(SHAPE), form), "here") == SHAPE).all()


@pytest.mark.parametrize("pair", [(0, 1), (0, 255), (0, 65535), (2, 1000)])
@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits(kind: type, pair: tuple[int, int]) -> None:
    data = encoded(Image.fromarray(np.where(SHAPE, pair[1], pair[0]).astype(kind)), "TIFF")
    assert (read_mask(data, "here") == SHAPE).all()


@pytest.mark.parametrize("background", [0, 255, 90])
@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 30, 60)])
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_one_colour_on_transparency(form: str, colour: tuple[int, int, int], background: int) -> None:
    pixels = np.full((H, W, 4), background, np.uint8)
    pixels[SHAPE] = (*colour, 255)
    pixels[~SHAPE, 3] = 0
    data = encoded(Image.fromarray(pixels), form, **({"lossless": True, "exact": True} if form == "WEBP" else {}))
    assert (read_mask(data, "here") == SHAPE).all()


def test_the_hidden_half_of_a_grey_mask_is_background() -> None:
    """White on black, of which the right half is transparent."""
    pixels = np.dstack([grey()] * 3 + [np.full((H, W), 255, np.uint8)])
    pixels[:, 64:, 3] = 0
    mask = read_mask(encoded(Image.fromarray(pixels)), "here")
    assert (mask[:, :64] == SHAPE[:, :64]).all() and not mask[:, 64:].any()


@pytest.mark.parametrize("quality", [30, 40, 50, 60, 75, 85, 95])
@pytest.mark.parametrize("high", [255, 128, 60])
@pytest.mark.parametrize(("form", "mode"), [("JPEG", "L"), ("JPEG", "RGB"), ("WEBP", "RGB")])
def test_a_lossy_mask_keeps_its_area(form: str, mode: str, high: int, quality: int) -> None:
    mask = read_mask(encoded(Image.fromarray(grey(0, high)).convert(mode), form, quality=quality), "here")
    assert mask.sum() == pytest.approx(SHAPE.sum(), rel=0.02)
    assert (mask & SHAPE).sum() / (mask | SHAPE).sum() > 0.97


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "RGB", "alpha"])
def test_smooth_edges_are_cut_in_the_middle(form: str, mode: str) -> None:
    smooth = cv2.GaussianBlur(grey(), (0, 0), 2)
    if mode == "alpha":
        if form == "BMP":
            return
        image = Image.fromarray(np.dstack([np.zeros((H, W, 3), np.uint8), smooth]))
    else:
        image = Image.fromarray(smooth).convert(mode)
    assert (read_mask(encoded(image, form), "here") == (smooth > 127)).all()


def test_grey_is_said_once_per_file(caplog: pytest.LogCaptureFixture) -> None:
    data = encoded(Image.fromarray(grey()), "JPEG", quality=60)
    with caplog.at_level(logging.WARNING):
        for where in ("said.jsonl: line 1", "said.jsonl: line 2", "other.jsonl: line 1"):
            read_mask(data, where)
            read_mask(encoded(Image.fromarray(grey())), where)
    assert [one.getMessage().partition(": a mask")[0] for one in caplog.records] == [
        "said.jsonl: line 1",
        "other.jsonl: line 1",
    ]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP"])
def test_a_palette_counts_by_index_without_its_void(form: str) -> None:
    index = np.where(SHAPE, 1, 0)
    index[10:20, 5:15] = 2
    border = np.zeros((H, W), bool)
    border[50:52] = True
    index[border] = 255
    mask = read_mask(encoded(palette(index, VOC), form), "here")
    expected = (SHAPE | (index == 2)) & ~border
    assert (mask == expected).all()


@pytest.mark.parametrize(
    ("colours", "object_index"),
    [
        ([0, 0, 0, 1, 1, 1], 1),  # as a label that looks black
        ([0, 0, 0, 255, 255, 255], 1),
        ([255, 255, 255, 0, 0, 0], 0),  # a quantised mask whose first colour is white
        ([68, 1, 84, 253, 231, 37], 1),  # two colours of which neither is black: by index
        ([0, 0, 0, 128, 0, 0], 1),
    ],
)
def test_a_palette_of_two_colours(colours: list[int], object_index: int) -> None:
    index = np.where(SHAPE, object_index, 1 - object_index)
    assert (read_mask(encoded(palette(index, colours)), "here") == SHAPE).all()


def test_a_palette_with_a_transparent_colour() -> None:
    image = palette(SHAPE, [255, 255, 255, 255, 255, 255])
    assert (read_mask(encoded(image, transparency=0), "here") == SHAPE).all()


def test_black_and_a_colour() -> None:
    pixels = np.zeros((H, W, 3), np.uint8)
    pixels[SHAPE] = (0, 0, 200)
    assert (read_mask(encoded(Image.fromarray(pixels)), "here") == SHAPE).all()
    pixels[0, 0] = (0, 200, 0)
    with pytest.raises(DataError, match=r"^m\.jsonl: line 3: a mask of several colours.*white on black.*run lengths"):
        read_mask(encoded(Image.fromarray(pixels)), "m.jsonl: line 3")
    pixels[~SHAPE], pixels[SHAPE] = (0, 200, 0), (200, 0, 0)
    with pytest.raises(DataError, match="several colours"):
        read_mask(encoded(Image.fromarray(pixels)), "here")


@pytest.mark.parametrize("value", [0, 1, 255])
def test_one_value_is_all_or_nothing(value: int) -> None:
    mask = read_mask(encoded(Image.fromarray(np.full((H, W), value, np.uint8))), "here")
    assert mask.shape == (H, W) and mask.all() == mask.any() == bool(value)


def test_a_mask_is_turned_as_its_photograph_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter clockwise
    for form in ("JPEG", "TIFF"):
        mask = read_mask(encoded(Image.fromarray(grey()), form, exif=exif), "here")
        assert mask.shape == (W, H)
        assert (mask == np.rot90(SHAPE, -1)).mean() > 0.99


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a readable mask"),
        (b"no image", "not a readable mask"),
        (encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 9), np.uint8)))[:-40], "truncated"),
        (encoded(Image.fromarray(SHAPE[:9])), "the mask is 128x9 but the image 128x96"),
        (encoded(Image.fromarray(np.zeros((H, W), np.uint8))), "the mask has no pixel"),
        (None, "no such mask file in"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, data: bytes | None, says: str) -> None:
    if data is not None:
        (tmp_path / "bad.png").write_bytes(data)
    with pytest.raises(DataError, match=says) as caught:
        load_mask(tmp_path, "bad.png", H, W, "m.jsonl: line 3")
    assert str(caught.value).startswith("m.jsonl: line 3: bad.png: ") and "\n" not in str(caught.value)
    assert caught.value.reason == "mask"


def test_a_mask_file_becomes_run_lengths(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "one.png").write_bytes(encoded(Image.fromarray(grey(0, 1))))
    assert (decode(load_mask(tmp_path, "masks\\one.png", H, W, "here")) == SHAPE).all()
