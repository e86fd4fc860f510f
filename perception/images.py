"""Encoded images: their key, their size without decoding, their pixels, and a cache of pixels.

Everywhere an image is what a viewer shows: the EXIF orientation of photographs is applied, to sizes and pixels alike.
"""

import hashlib
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from cachetools import LRUCache
from PIL import ExifTags, Image, ImageOps

from perception.errors import DataError
from perception.tables import cell
from perception.types import ImageHandle, ImageSource

_SIDEWAYS = (5, 6, 7, 8)  # orientations that swap height and width
_PHOTOGRAPHS = ("JPEG", "MPO", "WEBP", "AVIF")  # Pillow turns a TIFF itself; elsewhere it would decode to look for EXIF
BROKEN = OSError, EOFError, SyntaxError, ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, MemoryError
"""What Pillow raises for bytes that it cannot read."""
Image.MAX_IMAGE_PIXELS = None  # `data.refuse_pixels` is the limit


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
        with Image.open(opened) as image:
            mode, (width, height) = image.mode, image.size
            sideways = image.format in _PHOTOGRAPHS and image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image file; check the path in the annotations", "image") from error
    except BROKEN as error:
        raise DataError(f"{path}: not a readable image ({error}); replace or remove it", "image") from error
    if width * height > max_pixels:
        many = f"{width}x{height} is {width * height} pixels, more than {max_pixels}"
        raise DataError(f"{path}: {many}; make it smaller or raise data.refuse_pixels", "size")
    if mode[0] in "IF":
        raise DataError(f"{path}: more than 8 bits per channel (mode {mode}); convert it to 8 bits", "image")
    return (width, height) if sideways else (height, width)


def upright(image: Image.Image) -> Image.Image:
    """An opened image as a viewer shows it."""
    return ImageOps.exif_transpose(image) if image.format in _PHOTOGRAPHS else image


def decode(data: bytes) -> np.ndarray:
    """Pixels of an encoded image: (H, W, 3) uint8 RGB, contiguous; of an animated one the first frame.

    What is transparent is laid on white, as vLLM and Qwen's own loader do. Raises DataError.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = upright(opened)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return np.ascontiguousarray(image.convert("RGB"))
    except BROKEN as error:
        raise DataError(f"{len(data)} bytes do not decode as an image: {error}", "image") from error


def pixels(handle: ImageHandle, fetch: Callable[[ImageHandle], bytes]) -> np.ndarray:
    """(H, W, 3) uint8 RGB of what `fetch` gives. Raises DataError as `decode_named` does."""
    name = handle.ref if isinstance(handle.ref, ImageSource) else f"image {handle.key}"
    return decode_named(name, partial(fetch, handle))


def decode_named(name: object, fetch: Callable[[], bytes]) -> np.ndarray:
    """`decode` of what `fetch` gives. Raises DataError naming an image that has gone or does not decode."""
    try:
        return decode(fetch())
    except (DataError, OSError) as error:
        raise DataError(f"{name}: the image is damaged or gone ({error}); replace or remove it", "image") from error


def encode(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB -> PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def preview(data: bytes, side: int) -> bytes:
    """An encoded image with at most `side` pixels on its longer side: the bytes themselves where it has no more, else a
    JPEG. Raises DataError when they do not decode."""
    image = Image.fromarray(decode(data))
    if max(image.size) <= side:
        return data
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


class ImageCache:
    """Decoded images by their key, the most recently used ones."""

    def __init__(self, fetch: Callable[[ImageHandle], bytes], capacity: int = 256 << 20) -> None:
        """`fetch` gives the encoded bytes of an image; `capacity` is in bytes of pixels."""
        self._fetch = fetch
        self._kept: LRUCache[str, np.ndarray] = LRUCache(capacity, getsizeof=lambda image: image.nbytes)

    def get(self, handle: ImageHandle) -> np.ndarray:
        """(H, W, 3) uint8 RGB, read-only since it is shared. Raises DataError as `pixels` does."""
        if (found := self._kept.get(handle.key)) is not None:
            return found
        image = pixels(handle, self._fetch)
        image.flags.writeable = False
        if image.nbytes <= self._kept.maxsize:
            self._kept[handle.key] = image
        return image
