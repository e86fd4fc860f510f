"""Files of a data set: read their text, parse their JSON into models, find and probe their images."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from perception.errors import DataError
from perception.images import probe

Model = TypeVar("Model", bound=BaseModel)


class Images:
    """Finds and probes the images of one data set, each file once."""

    def __init__(self, annotations: Path, max_pixels: int) -> None:
        self._folders = (annotations.parent, annotations.parent / "images")
        self._max_pixels = max_pixels
        self._sizes: dict[Path, tuple[int, int]] = {}

    def find(self, name: str, where: str) -> tuple[Path, int, int]:
        """(path, height, width) of an image named relative to the annotations or to `images/` beside them."""
        for folder in self._folders:
            path = folder / name
            if path not in self._sizes and path.is_file():
                self._sizes[path] = probe(path, self._max_pixels)
            if path in self._sizes:
                return path, *self._sizes[path]
        raise DataError(f"{where}: no image {name} in {self._folders[0]} or its images/; mend the path or add the file")


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; set data.train and data.eval to your annotations") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def parse(model: type[Model], text: str, where: str) -> Model:
    """A JSON object as `model`. DataError names the first field that is wrong."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise DataError(f"{where}: not one JSON object ({first['msg']})") from error
        field = ".".join(str(part) for part in first["loc"]) or "record"
        raise DataError(f"{where}: {field}: {first['msg']}") from error
