"""Guards images and masks: sizes from headers, pixels as displayed, one line for a broken file, run-length sets."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from perception import masks
from perception.errors import DataError
from perception.images import ImageCache, content_key, decode, probe
from perception.types import ImageHandle, ImageSource
from tests.builders import noise


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def source(path: Path) -> ImageSource:
    return ImageSource(path=str(path))


def png_header(height: int, width: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">II", zlib.crc32(chunk), 0) + b"IDAT"


def test_decode_gives_the_pixels_in_rgb() -> None:
    pixels = noise(0, 5, 7)
    image = decode(png(pixels))
    assert (image == pixels).all()
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK"])
def test_every_8_bit_mode_decodes_to_rgb(mode: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(0, 4, 6)).convert(mode).save(buffer, "TIFF")
    assert decode(buffer.getvalue()).shape == (4, 6, 3)


def test_probe_reads_the_size_without_the_pixels(tmp_path: Path) -> None:
    path = tmp_path / "header.png"
    path.write_bytes(png_header(30, 40))
    assert probe(source(path), max_pixels=1200) == (30, 40)


def test_a_photograph_is_what_a_viewer_shows(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16, 0] = 255  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise: left goes up
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    image = decode(path.read_bytes())
    assert probe(source(path), 1000) == image.shape[:2] == (32, 16)
    assert image[4, 8, 0] > 200
    assert image[28, 8, 0] < 50


MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "RGBX")
FORMATS = ("JPEG", "MPO", "TIFF", "WEBP", "AVIF", "PNG", "GIF", "BMP", "JPEG2000", "TGA", "PPM")
TURNED = ("JPEG", "MPO", "TIFF", "WEBP", "AVIF")
"""Formats whose orientation a viewer applies."""


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("mode", MODES)
def test_the_header_says_the_size_of_the_pixels(form: str, mode: str) -> None:
    height, width = 24, 40
    image = Image.fromarray(noise(0, height, width)).convert("P" if mode == "PA" else "RGB").convert(mode)
    for orientation in range(9):  # 0: none is stated
        exif, buffer = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        try:
            image.save(buffer, form, exif=exif if orientation else b"")
        except (OSError, KeyError, ValueError):
            assert (form, mode) not in {(form, "RGB"), ("PNG", "RGBA"), ("TIFF", "CMYK")}
            return  # Pillow does not write this mode in this format
        found = ImageSource(path="here", data=buffer.getvalue())
        size = probe(found, max_pixels=1000)
        assert size == decode(buffer.getvalue()).shape[:2]
        assert size == ((width, height) if orientation > 4 and form in TURNED else (height, width))


@pytest.mark.parametrize("form", TURNED)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_undone_once(form: str, orientation: int) -> None:
    """EXIF 2.3, tag 0x0112: where the 0th row and the 0th column of what is stored are shown."""
    stored = np.zeros((24, 40, 3), np.uint8)
    stored[:12, :20] = 255  # the corner of the 0th row and column
    row, column = ["top left", "top right", "bottom right", "bottom left", "left top", "right top", "right bottom",
                   "left bottom"][orientation - 1].split()  # fmt: skip
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(buffer, form, exif=exif)
    image = decode(buffer.getvalue())[..., 0].astype(int)
    height, width = image.shape
    upper = "top" in (row, column)
    left = "left" in (row, column)
    corner = image[: height // 2] if upper else image[height // 2 :]
    corner = corner[:, : width // 2] if left else corner[:, width // 2 :]
    assert corner.mean() > 245 and image.mean() == pytest.approx(255 / 4, abs=8)


def clear(mode: str) -> Image.Image:
    """Red where opaque, in its left half; what is hidden is blue."""
    pixels = np.zeros((4, 8, 4), np.uint8)
    pixels[:, :4] = (200, 0, 0, 255)
    pixels[:, 4:] = (0, 0, 200, 0)
    if mode == "P":
        image = Image.fromarray(np.repeat([[0, 1]], 4, axis=1).repeat(4, axis=0).astype(np.uint8), "P")
        image.putpalette([200, 0, 0, 0, 0, 200])
        image.info["transparency"] = 1
        return image
    if mode == "RGB":
        image = Image.fromarray(pixels[..., :3])
        image.info["transparency"] = (0, 0, 200)
        return image
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(
    ("form", "mode"),
    [("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "P"), ("PNG", "RGB"), ("GIF", "P"), ("TIFF", "RGBA"), ("WEBP", "RGBA")],
)
@pytest.mark.parametrize("animated", [False, True])
def test_what_is_transparent_lies_on_white(form: str, mode: str, animated: bool) -> None:
    buffer, frame = io.BytesIO(), clear(mode)
    other = Image.new("RGBA", frame.size, (0, 200, 0, 255))
    more = {"save_all": True, "append_images": [other.convert(frame.mode)]} if animated else {}
    frame.save(buffer, form, **more, **({"lossless": True, "exact": True} if form == "WEBP" else {}))
    image = decode(buffer.getvalue())
    assert (image[:, 4:] == 255).all()
    opaque = frame.convert("RGB").getpixel((0, 0))
    assert (image[:, :4] == opaque).all()


def test_half_transparent_pixels_are_mixed_as_by_vllm() -> None:
    """`rgba_to_rgb` of vLLM and `to_rgb` of qwen-vl-utils: paste on white through the alpha channel."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8)
    image = Image.fromarray(pixels)
    expected = Image.new("RGB", image.size, (255, 255, 255))
    expected.paste(image, mask=image.split()[3])
    assert (decode(png(pixels)) == np.asarray(expected)).all()


def test_the_limit_of_pixels_is_ours_alone() -> None:
    found = ImageSource(path="wide.png", data=png_header(20_000, 20_000))  # Pillow refuses 178,956,970 and more
    assert probe(found, max_pixels=400_000_000) == (20_000, 20_000)
    with pytest.raises(DataError, match=r"20000x20000 is 400000000 pixels, more than 399999999.*data\.refuse_pixels"):
        probe(found, max_pixels=399_999_999)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "no such image file"),
        (b"", "empty"),
        (b"not an image at all", "not a readable image"),
        (png_header(10_000, 10_000), "more than 50000000"),
        (png_header(30_000, 30_000), "more than 50000000"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path: Path, data: bytes | None, says: str) -> None:
    path = tmp_path / "bad.png"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=says) as caught:
        probe(source(path), max_pixels=50_000_000)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_16_bits_are_refused_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((3, 3), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match="8 bits"):
        probe(source(tmp_path / "deep.png"), 100)


def photograph(form: str) -> bytes:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112], exif[0x010E] = 6, "noise"
    Image.fromarray(noise(0, 6, 9)).save(buffer, form, exif=exif)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF", "GIF", "BMP"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_read_or_refused(form: str, data: st.DataObject) -> None:
    whole = bytearray(photograph(form))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    broken = bytes(whole[: data.draw(st.integers(0, 2 * len(whole)))])
    with suppress(DataError):  # anything else is a bug
        assert decode(broken).ndim == 3
    with suppress(DataError):
        assert len(probe(ImageSource(path="here", data=broken), 10_000)) == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II", b"Exif\0\0garbage!!", b"Exif\0\0MM\0*\0\0\0\x08\xff", b"Exif\0\0II*\0\xff\xff\xff\x7f"]
)
def test_damaged_exif_is_no_traceback(form: str, exif: bytes) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(0, 6, 9)).save(buffer, form, exif=exif)
    with suppress(DataError):
        assert probe(ImageSource(path="here", data=buffer.getvalue()), 100) == decode(buffer.getvalue()).shape[:2]


def test_cache_keeps_the_last_used() -> None:
    encoded = {f"ref{i}": png(noise(i, 2, 2)) for i in range(3)}
    handles = [ImageHandle(key=content_key(data), height=2, width=2, ref=ref) for ref, data in encoded.items()]
    fetched: list[str] = []

    def fetch(handle: ImageHandle) -> bytes:
        fetched.append(handle.ref)
        return encoded[handle.ref]

    cache = ImageCache(fetch, capacity=2 * 12)  # bytes: each has 2 x 2 pixels of 3
    first, second, third = handles
    assert cache.get(first) is cache.get(first)
    cache.get(second)
    cache.get(first)
    cache.get(third)  # drops the second
    assert fetched == ["ref0", "ref1", "ref2"]
    cache.get(first)
    assert (cache.get(second) == noise(1, 2, 2)).all()
    assert fetched == ["ref0", "ref1", "ref2", "ref1"]
    assert not cache.get(first).flags.writeable
    small = ImageCache(fetch, capacity=11)
    assert (small.get(first) == noise(0, 2, 2)).all() and not small.get(first).flags.writeable
    assert fetched[-2:] == ["ref0", "ref0"], "what is larger than the whole cache is not kept"


def test_content_key_is_sha256() -> None:
    assert content_key(b"abc") == hashlib.sha256(b"abc").hexdigest()
    assert content_key(b"abc").startswith("ba7816bf")


binary = arrays(bool, st.tuples(st.integers(1, 20), st.integers(1, 20)))


@settings(max_examples=40)
@given(binary)
def test_masks_survive_encoding(mask: np.ndarray) -> None:
    rle = masks.encode(mask)
    assert (masks.decode(rle) == mask).all()
    assert masks.area(rle) == mask.sum()
    assert (rle.height, rle.width) == mask.shape
    runs = masks.run_lengths(rle.counts)
    masks.check_runs(runs, *mask.shape)
    assert (np.repeat(np.arange(len(runs)) % 2 == 1, runs) == mask.ravel(order="F")).all()


@settings(max_examples=40)
@given(
    st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(
        lambda s: st.lists(arrays(bool, s), min_size=2, max_size=4)
    )
)
def test_mask_sets_equal_numpy(planes: list[np.ndarray]) -> None:
    encoded = [masks.encode(plane) for plane in planes]
    joined = masks.union(encoded, *planes[0].shape)
    assert (masks.decode(joined) == np.logical_or.reduce(planes)).all()


def test_mask_box_and_sizes() -> None:
    mask = np.zeros((6, 8), bool)
    mask[1:4, 2:7] = True
    assert masks.bounding_box(masks.encode(mask)) == (2, 1, 7, 4)
    assert masks.area(masks.union([], 6, 8)) == 0


@pytest.mark.parametrize("counts", [b"", b"o", b"0!", b"\x7f", b"oooooooo0"])
def test_damaged_run_lengths_never_reach_pycocotools(counts: bytes) -> None:
    with pytest.raises(ValueError, match="run-length text"):
        masks.run_lengths(counts)


@pytest.mark.parametrize("runs", [[5], [7], [-1, 7], [2.0, 4.0], [[6]], []])
def test_runs_must_cover_the_image(runs: list) -> None:
    with pytest.raises(ValueError, match="add up"):
        masks.check_runs(np.array(runs), 2, 3)
