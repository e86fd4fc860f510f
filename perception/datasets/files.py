"""Files of a data set: read their text, parse their JSON into models, find and probe their images."""

import base64
import logging
import os
import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from perception.errors import DataError
from perception.grammar import clean_json
from perception.images import probe
from perception.types import ImageSource

log = logging.getLogger(__name__)
Model = TypeVar("Model")
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_LONGEST_NAME = 1024  # characters; what is longer must be an image itself
_said: set[tuple[str, str]] = set()


def warn_once(where: str, doubt: str) -> None:
    """Say what is doubtful, and where it is first met: once per file, which opens `where`."""
    if (said := (where.partition(": ")[0], doubt)) not in _said:
        _said.add(said)
        log.warning("%s: %s", where, doubt)


def find_file(folders: Iterable[Path], name: str) -> Path | None:
    """The file of this name in the first folder that has it, with Windows's separators and either form of accents."""
    slashed = name.replace("\\", "/")
    forms = dict.fromkeys([name, slashed, unicodedata.normalize("NFC", slashed), unicodedata.normalize("NFD", slashed)])
    return next((folder / form for folder in folders for form in forms if os.path.isfile(folder / form)), None)


class Images:
    """Finds and probes the images of one data set."""

    def __init__(self, annotations: Path, folder: str | None, max_pixels: int) -> None:
        """`folder`: where the pictures are (`data.images`); by default beside the annotations or in `images/` there."""
        beside = annotations if annotations.is_dir() else annotations.parent
        self._folders = (Path(folder),) if folder else (beside, beside / "images")
        self._max_pixels = max_pixels

    def find(self, named: ImageSource | str, where: str) -> tuple[ImageSource, int, int]:
        """(source, height, width) of an image as the annotations name it. Raises DataError."""
        source = self._locate(named, where) if isinstance(named, str) else named
        return source, *probe(source, self._max_pixels)

    def _locate(self, name: str, where: str) -> ImageSource:
        if address := re.match(r"\w+://[^?]*", name):
            raise DataError(f"{where}: {address[0]} is an address; download it first and name the file", "image")
        if name.startswith("data:") or len(name) > _LONGEST_NAME:
            return ImageSource(path=where, data=_embedded(name, where))
        if path := find_file(self._folders, name):
            return ImageSource(path=str(path.absolute()))
        tried, cure = " or ".join(map(str, self._folders)), "mend the path, add the file, or set data.images"
        raise DataError(f"{where}: no image {name} in {tried}; {cure}", "image")


def _embedded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode("".join(text.partition("base64,")[2].split() or text.split()), validate=True)
    except ValueError as error:
        raise DataError(f"{where}: the image is no file name and no base64 ({error}); mend it", "image") from error


def files_in(folder: Path, *suffixes: str) -> list[Path]:
    """The files with these suffixes, by name, without hidden ones. Raises DataError where there is none."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    if not (found := [file for file in files if file.suffix.lower() in suffixes and file.name[0] != "."]):
        raise DataError(f"{folder}: no {' or '.join(suffixes)} file there; is data.train the folder the reader names?")
    return found


def read_bytes(path: Path) -> bytes:
    """A file's bytes, without a byte order mark. Raises DataError."""
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; set data.train and data.eval to your annotations") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def read_text(path: Path) -> str:
    """A file's text. Raises DataError."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); save it as UTF-8") from error


@cache
def _decoder(model: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(model, strict=False)


def parse(model: type[Model], data: bytes | str | msgspec.Raw, where: str) -> Model:
    """JSON as `model`, a msgspec type, its texts clean. DataError names the first field that is wrong."""
    try:
        return _decoder(model).decode(data)  # type: ignore[arg-type]
    except msgspec.ValidationError as error:
        raise DataError(f"{where}: {error}; mend the field") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        text = data if isinstance(data, str) else bytes(data).decode("utf-8", "replace")
        if (mended := clean_json(text)) != text:  # as texts have that were cut inside a character
            return parse(model, mended, where)
        raise DataError(f"{where}: not valid JSON ({error})") from error
