"""Atomic writes: files and folders that appear whole or not at all; and checksums."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def scratch_path(path: Path) -> Path:
    """Where `path` is written before it takes its place: beside it, hidden."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file or a folder to. It takes the place of `path` when the block ends well.

    A reader sees the old one or the new one, never half of it; an interrupted write leaves the old one.
    """
    scratch = scratch_path(path)
    _remove(scratch)
    try:
        yield scratch
        if scratch.is_dir():
            _remove(path)
        scratch.replace(path)
    finally:
        _remove(scratch)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
