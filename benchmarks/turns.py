"""Sides of a benchmark, each a process of its own, that take turns: while one steps, the others rest."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

import psutil

STEP_LIMIT_S = 1800.0
_END_S = 60.0


class Side:
    """A side's process, seen from here: it runs `serve(link, *arguments)`, which calls `wait` before every step and
    sends the figures of each."""

    def __init__(self, name: str, serve: Callable[..., None], *arguments: Any, **environment: str) -> None:
        """`environment`: variables that it is started with."""
        context = multiprocessing.get_context("spawn")
        self._link, theirs = context.Pipe()
        self._name, self._resting = name, False
        self._process = context.Process(target=_run, args=(theirs, serve, arguments))
        with patch.dict(os.environ, environment):
            self._process.start()
        theirs.close()

    def rest(self) -> None:
        """Wait until it has nothing left to do but the next step: a trainer still loads its next batch after one."""
        if not self._resting:
            self._receive()
            self._resting = True

    def step(self) -> dict[str, float]:
        """The step's figures, and `cpu_s`: processor time of the process and all its children."""
        self._resting = False
        before = self._cpu_seconds()
        self._link.send("step")
        figures: dict[str, float] = self._receive()
        return figures | {"cpu_s": self._cpu_seconds() - before}

    def _receive(self) -> Any:
        """Raises RuntimeError if the process has died, TimeoutError after `STEP_LIMIT_S`."""
        try:
            if not self._link.poll(STEP_LIMIT_S):
                raise TimeoutError(f"{self._name}: no step within {STEP_LIMIT_S:.0f} s")
            return self._link.recv()
        except (EOFError, ConnectionResetError) as error:
            raise RuntimeError(f"{self._name}: the process has ended; its own message is above") from error

    def _cpu_seconds(self) -> float:
        spent, own = 0.0, psutil.Process(self._process.pid)
        for process in (own, *own.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):  # ended since it was listed
                spent += sum(process.cpu_times()[:2])
        return spent

    def stop(self) -> None:
        """It ends by itself once there are no more turns."""
        self._link.close()
        self._process.join(_END_S)
        self._process.terminate()
        self._process.join(_END_S)


def take_turns(running: dict[str, Side], steps: int) -> dict[str, list[dict[str, float]]]:
    """Figures of every step of each side. The one that begins alternates; in the end all are stopped."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in running}
    try:
        for number in range(steps):
            for name in running if number % 2 else reversed(running):
                for side in running.values():
                    side.rest()
                taken[name].append(running[name].step())
    finally:
        for side in running.values():
            side.stop()
    return taken


def wait(link: Connection) -> None:
    """Say that nothing is left to do, then wait for the next step's turn; where there is none, end the process."""
    try:
        link.send(None)
        link.recv()
    except (EOFError, OSError):
        sys.exit()


def _run(link: Connection, serve: Callable[..., None], arguments: Sequence[Any]) -> None:
    os.dup2(2, 1)  # libraries print; standard output is for the result
    serve(link, *arguments)
    with suppress(OSError):  # nobody waits for it any more
        link.send(None)
