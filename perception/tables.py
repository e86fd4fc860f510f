"""Tables of samples: parquet files, folders saved by `datasets`, and data sets of the hub, row by row.

A table is opened once per process and stays on disk: a row is read when it is asked for.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from perception.errors import DataError, UserError
from perception.types import ImageSource


@lru_cache(maxsize=16)
def open_table(path: str, split: str = "") -> Any:
    """A `datasets.Dataset` whose images stay encoded.

    `path`: a parquet file or a folder of them, a folder written by `save_to_disk`, or a hub id; `split` chooses one of
    several splits and may be left out where there is one. Raises UserError where the extra is not installed, DataError
    for what cannot be opened.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{path}: tables are read by the library datasets: pip install 'relook[datasets]'") from error
    datasets.disable_progress_bars()
    try:
        found = _load(datasets, Path(path), split)
    except Exception as error:  # datasets raises its own errors, pyarrow's and the hub's
        why = " ".join(str(error).split())
        cure = "give a parquet file, a folder saved by datasets, or a hub id"
        raise DataError(f"{path}: cannot be opened as a table ({why}); {cure}") from error
    if isinstance(found, dict):
        if split not in found and len(found) > 1:
            raise DataError(f"{path}: no split {split!r}; set data.options.split to one of {', '.join(found)}")
        found = found.get(split, next(iter(found.values())))
    encoded = datasets.Image(decode=False)
    for name, kind in found.features.items():
        if isinstance(kind, datasets.Image):
            found = found.cast_column(name, encoded)
        elif isinstance(getattr(kind, "feature", None), datasets.Image):
            found = found.cast_column(name, datasets.List(encoded))
    return found


def _load(datasets: Any, path: Path, split: str) -> Any:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    files = [path] if path.is_file() else sorted(path.rglob(f"{split or ''}*.parquet"))
    if files:
        return datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    if path.exists():
        raise FileNotFoundError("no parquet file and no saved data set in it")
    return datasets.load_dataset(str(path), split=split or None)


def rows(path: Path, split: str, *columns: str) -> Iterator[tuple[ImageSource, dict[str, Any]]]:
    """Each row's picture and those of the columns that there are. Raises DataError where there is none of them.

    Name light columns alone: masks are read when a question is drawn.
    """
    table = open_table(str(path), split)
    if not (found := [name for name in columns if name in table.column_names]):
        raise DataError(f"{path}: none of the columns {', '.join(columns)}, only {', '.join(table.column_names)}")
    picture = "images" if "images" in table.column_names else "image"
    for number, cells in enumerate(table.select_columns(found)):
        yield ImageSource(path=str(path), split=split, row=number, column=picture), cells


def cell(path: str, split: str, row: int, column: str) -> bytes:
    """The encoded image in a cell: bytes, a struct of bytes and path, or a list with one of those.

    Raises DataError where the cell holds no image.
    """
    value = open_table(path, split)[row][column]
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        value = value.get("bytes") or (Path(value["path"]).read_bytes() if value.get("path") else None)
    if not isinstance(value, bytes):
        raise DataError(f"{path}, row {row}: column {column} holds no image", "image")
    return value
