"""Atomic writes: files and folders that appear whole or not at all; and checksums."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """A path to write a file or a folder to. It takes the place of `path` when the block ends well.

    A reader sees the old one or the new one, never half of it; an interrupted write leaves the old one. `shared`:
    others may be writing the same; a folder that is there by then stays, since somebody may be reading it.
    """
    scratch = path.with_name(f".{path.name}{f'.{uuid4().hex}' if shared else ''}.partial")
    _remove(scratch)
    try:
        yield scratch
        if scratch.is_dir() and not shared:
            _remove(path)
        try:
            scratch.replace(path)
        except OSError:
            if not (shared and path.is_dir()):
                raise
    finally:
        _remove(scratch)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    with replacing(path, shared=True) as scratch:
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
