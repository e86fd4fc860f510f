"""Cursor: samples in a reproducible order."""

from collections.abc import Sequence

import numpy as np

from perception.errors import DataError, SkippedRecordError
from perception.types import Sample


class Cursor:
    """Endless passes over the samples, reshuffled every epoch. One integer is its whole state.

    Where a record is left out (`data.on_bad_record=skip`) the next one of the same epoch takes its place.
    """

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
        for place in range(offset, offset + len(self._order)):
            try:
                return self._samples[int(self._order[place % len(self._order)])]
            except SkippedRecordError as error:
                last = error
        raise DataError(f"every record was left out; the last: {last}", last.reason) from last
