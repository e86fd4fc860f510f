"""Samples in a reproducible order, and their images, put into the object store once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import ray

from perception.images import content_key
from perception.lru import Lru
from perception.types import ImageHandle, Sample


class Cursor:
    """Endless passes over the samples, reshuffled every epoch. One integer is its whole state."""

    def __init__(self, samples: Sequence[Sample], seed: int, position: int = 0) -> None:
        self._samples, self._seed, self.position = samples, seed, position

    def next(self, n: int) -> list[Sample]:
        taken = [self._at(i) for i in range(self.position, self.position + n)]
        self.position += n
        return taken

    def _at(self, position: int) -> Sample:
        epoch, offset = divmod(position, len(self._samples))
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._samples))
        return self._samples[self._order[offset]]


class ImageStore(Lru[ImageHandle]):
    """Encoded image files in Ray's object store, each at most once while it is among the last `capacity` used."""

    def __init__(self, capacity: int = 1024) -> None:
        super().__init__(capacity)

    def handle(self, sample: Sample) -> ImageHandle:
        """Raises OSError when the file has gone since the data set was checked."""
        return self.value(sample.image_path, lambda: _stored(sample))


def _stored(sample: Sample) -> ImageHandle:
    data = Path(sample.image_path).read_bytes()
    return ImageHandle(key=content_key(data), height=sample.height, width=sample.width, ref=ray.put(data))
