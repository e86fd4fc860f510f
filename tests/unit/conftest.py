"""No unit test starts a process: what needs one stands in tests/stack."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import pytest


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
