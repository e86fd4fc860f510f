"""A checksum of weights that an engine may stack by rows (q over k over v, gate over up) without changing it."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable

import numpy as np

_MODULUS = 1 << 64


def tensor_sum(name: str, columns: np.ndarray) -> int:
    """Of one tensor: the weighted sum, mod 2**64, of (columns,) int64, themselves the sums over its rows.

    A row's elements are the tensor's bit patterns as signed integers; a vector is one column. The weight of a column
    depends on its number and on the layer numbers in `name`. It is odd, so a single changed element always shows, and
    it comes from SplitMix64 (Steele et al., 2014, "Fast splittable pseudorandom number generators"), so that errors
    cannot be expected to cancel. Rows of zeros count nothing: an engine may pad with them.
    """
    seed = zlib.crc32(" ".join(re.findall(r"\d+", name)).encode())
    mixed = (np.arange(1, len(columns) + 1, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    weights = (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)
    return int((columns.astype(np.uint64) * weights).sum())


def total(sums: Iterable[int]) -> int:
    """Of several tensors, or of several totals."""
    return sum(sums) % _MODULUS
