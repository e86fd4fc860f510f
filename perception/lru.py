"""A cache that forgets what was used longest ago."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

V = TypeVar("V")


class Lru(Generic[V]):
    """The `capacity` most recently used values by key; `hits` and `misses` count how often one was there."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self._capacity = capacity
        self._kept: OrderedDict[str, V] = OrderedDict()
        self.hits = self.misses = 0

    def value(self, key: str, make: Callable[[], V]) -> V:
        """The value under `key`, made where it is missing; what `make` raises leaves the cache as it was."""
        if key in self._kept:
            self.hits += 1
        else:
            self.misses += 1
            self._kept[key] = make()
            if len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]
