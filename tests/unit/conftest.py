"""No unit test starts a process: what needs one stands in tests/stack."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from tests.builders import noise, png, rectangle


@pytest.fixture(scope="module", autouse=True)
def no_process() -> Iterator[None]:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise OSError(f"a unit test starts a process ({arguments[1:2]}); move it to tests/stack")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", refuse)
        patch.setattr(BaseProcess, "start", refuse)
        patch.setattr(os, "fork", refuse)
        patch.setattr(os, "posix_spawn", refuse)
        yield


@pytest.fixture(scope="session", autouse=True)
def parsed_once() -> Iterator[None]:
    """Settings are composed some 250 times, each time of the same files."""
    load = OmegaConf.load
    parsed = cache(lambda text: load(io.StringIO(text)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            OmegaConf, "load", lambda file: deepcopy(parsed(file.read() if hasattr(file, "read") else file.read_text()))
        )
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image a.png and a mask mask.png, 30 wide and 20 high, and a broken one of each kind."""
    data = png(noise(0, 20, 30))
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "corrupt.png").write_bytes(b"\x89PNG and then nothing")
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "large.png").write_bytes(png(np.zeros((40, 40), np.uint8)))
    (tmp_path / "mask.png").write_bytes(png(rectangle(5, 5, 15, 10, 20, 30).astype(np.uint8) * 255))
    (tmp_path / "small_mask.png").write_bytes(png(np.ones((10, 15), np.uint8)))
    (tmp_path / "black.png").write_bytes(png(np.zeros((20, 30), np.uint8)))
    return tmp_path


@pytest.fixture
def command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Calls a program's entry as from a shell; returns its exit status. What Hydra does to logging is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def call(program: Any, *words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["program", *words])
        try:
            program()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    yield call
    root.handlers[:] = handlers
    root.setLevel(level)
