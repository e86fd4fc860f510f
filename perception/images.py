"""Encoded images: their key, their size without decoding, their pixels, and a cache of pixels.

Everywhere an image is what a viewer shows: the EXIF orientation of photographs is applied, to sizes and pixels alike.
"""

import hashlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cachetools import LRUCache
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from perception.errors import DataError
from perception.tables import cell
from perception.types import ImageHandle, ImageSource

_SIDEWAYS = (5, 6, 7, 8)  # orientations that swap height and width
_PHOTOGRAPHS = ("JPEG", "MPO", "TIFF", "WEBP")  # elsewhere PIL would decode the pixels only to look for EXIF
_BROKEN = (UnidentifiedImageError, OSError, SyntaxError, ValueError)  # what PIL raises for bytes it cannot read


def content_key(data: bytes) -> str:
    """SHA-256 of the encoded bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def read(source: ImageSource) -> bytes:
    """The encoded image. Raises OSError where its file has gone, DataError where a table's cell holds none."""
    if source.data is not None:
        return source.data
    if source.row is None:
        return Path(source.path).read_bytes()
    return cell(source.path, source.split, source.row, source.column)


def source_key(source: ImageSource) -> str:
    """Names an image without reading it: SHA-256 of its path, split, row and column, its file's size and time, and of
    bytes that it carries."""
    path = Path(source.path)
    stat = path.stat() if source.data is None and path.exists() else None
    named = (source.path, source.split, source.row, source.column, stat and (stat.st_size, stat.st_mtime_ns))
    return content_key(repr(named).encode() + (source.data or b""))


def probe(path: ImageSource, max_pixels: int) -> tuple[int, int]:
    """(height, width) as displayed, from the header alone. Raises DataError for an image that could not be used."""
    try:
        opened = path.path if path.row is None and path.data is None else io.BytesIO(read(path))
        if isinstance(opened, str) and Path(opened).stat().st_size == 0:
            raise DataError(f"{path}: the image file is empty (0 bytes); copy it again", "image")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is the limit here
            image = Image.open(opened)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image file; check the path in the annotations", "image") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: the image has more than {max_pixels} pixels; make it smaller", "size") from error
    except _BROKEN as error:
        raise DataError(f"{path}: not a readable image ({error}); replace or remove it", "image") from error
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise DataError(
                f"{path}: {width}x{height} is {width * height} pixels, more than {max_pixels}; "
                "make it smaller or raise data.refuse_pixels",
                "size",
            )
        if image.mode[0] in "IF":
            raise DataError(f"{path}: more than 8 bits per channel (mode {image.mode}); convert it to 8 bits", "image")
        sideways = image.format in _PHOTOGRAPHS and image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
        return (width, height) if sideways else (height, width)


def decode(data: bytes) -> np.ndarray:
    """Pixels of an encoded image: (H, W, 3) uint8 RGB, contiguous. Raises DataError when the bytes do not decode."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image) if image.format in _PHOTOGRAPHS else image
            return np.ascontiguousarray(upright.convert("RGB"))
    except _BROKEN as error:
        raise DataError(f"{len(data)} bytes do not decode as an image: {error}", "image") from error


def encode(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB -> PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def preview(data: bytes, side: int) -> bytes:
    """An encoded image with at most `side` pixels on its longer side: the bytes themselves where it has no more, else a
    JPEG. Raises DataError when they do not decode."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if max(image.size) <= side:
                return data
            image.draft("RGB", (side, side))  # a JPEG is decoded at an eighth to a half of its size
            small = ImageOps.exif_transpose(image).convert("RGB")
            small.thumbnail((side, side))
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=90)
            return buffer.getvalue()
    except _BROKEN as error:
        raise DataError(f"{len(data)} bytes do not decode as an image: {error}", "image") from error


class ImageCache:
    """Decoded images by their key, the most recently used ones."""

    def __init__(self, fetch: Callable[[ImageHandle], bytes], capacity: int = 256 << 20) -> None:
        """`fetch` gives the encoded bytes of an image; `capacity` is in bytes of pixels."""
        self._fetch = fetch
        self._kept: LRUCache[str, np.ndarray] = LRUCache(capacity, getsizeof=lambda image: image.nbytes)

    def get(self, handle: ImageHandle) -> np.ndarray:
        """(H, W, 3) uint8 RGB, read-only since it is shared. Raises DataError when it does not decode."""
        if (found := self._kept.get(handle.key)) is not None:
            return found
        image = decode(self._fetch(handle))
        image.flags.writeable = False
        if image.nbytes <= self._kept.maxsize:
            self._kept[handle.key] = image
        return image
