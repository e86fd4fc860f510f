"""An actor that does what it is told, in a module that its process can import."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path


class Spent(RuntimeError):
    """Raised by an actor that is of no more use."""


class Worker:
    """An actor that does what it is told. `folder`: where it leaves notes."""

    def __init__(self, number: int, folder: str) -> None:
        self.number, self._folder, self._made = number, Path(folder), time.time_ns()

    def start(self, slow: float = 0.0, broken: bool = False) -> int:
        time.sleep(slow)
        if broken:
            raise FileNotFoundError("no such weights")
        return 10 + self.number

    def add(self, one: int, other: int = 5) -> tuple[int, int]:
        """(this actor's number, the sum)."""
        return self.number, one + other

    def made(self) -> int:
        return self._made

    async def nap(self, seconds: float) -> int:
        """Several at once, as an engine takes its requests."""
        await asyncio.sleep(seconds)
        return self.number

    def die(self) -> None:
        os._exit(1)

    def die_once(self, name: str) -> int:
        """In the process that is asked first, wherever that is."""
        path = self._folder / name
        if not path.exists():
            path.touch()
            os._exit(1)
        return self.number

    def give_up(self, name: str) -> int:
        """As `die_once`, by an exception that says so."""
        path = self._folder / name
        if not path.exists():
            path.touch()
            raise Spent("nothing works any more")
        return self.number

    def fail(self, kind: str) -> None:
        raise {"value": ValueError, "timeout": TimeoutError}[kind]("the disk is full")

    def farewell(self) -> None:
        (self._folder / f"farewell-{self.number}").touch()
