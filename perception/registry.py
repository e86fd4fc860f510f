"""Things looked up by a name that a person may have typed; a module of the user's own may register more."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Generic, TypeVar

from perception.errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    def __init__(self, kind: str) -> None:
        """`kind` names the things in messages, e.g. "task"."""
        self._kind = kind
        self._known: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: what it is put on is found under `name`."""

        def keep(item: T) -> T:
            self._known[name] = item
            return item

        return keep

    def __getitem__(self, name: str) -> T:
        """Raises UserError with the nearest name for one that nothing is registered under."""
        if name not in self._known:
            near = difflib.get_close_matches(name, self._known, n=1, cutoff=0.0)
            raise UserError(f"unknown {self._kind} {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def names(self) -> tuple[str, ...]:
        return tuple(self._known)
