"""Files of a data set: read their text, parse their JSON into models, find and probe their images."""

from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from perception.errors import DataError
from perception.images import probe
from perception.types import ImageSource

Model = TypeVar("Model")
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


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
        for folder in self._folders:
            if (folder / name).is_file():
                return ImageSource(path=str((folder / name).absolute()))
        tried, cure = " or ".join(map(str, self._folders)), "mend the path, add the file, or set data.images"
        raise DataError(f"{where}: no image {name} in {tried}; {cure}", "image")


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
    """JSON as `model`, a msgspec type. DataError names the first field that is wrong."""
    try:
        return _decoder(model).decode(data)  # type: ignore[arg-type]
    except msgspec.ValidationError as error:
        raise DataError(f"{where}: {error}; mend the field") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: not valid JSON ({error})") from error
