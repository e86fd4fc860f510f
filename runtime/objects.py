"""Encoded images in Ray's object store: put there once, fetched where they are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from cachetools import LRUCache

from perception.images import content_key
from perception.types import ImageHandle, Sample

FETCH_TIMEOUT_S = 60.0


class ImageStore:
    """Image files in the object store, each at most once while it is among the last `capacity` used."""

    def __init__(self, capacity: int = 1024) -> None:
        self._kept: LRUCache[str, ImageHandle] = LRUCache(capacity)

    def handle(self, sample: Sample) -> ImageHandle:
        """Raises OSError when the file has gone since the data set was checked."""
        if sample.image_path not in self._kept:
            data = Path(sample.image_path).read_bytes()
            handle = ImageHandle(key=content_key(data), height=sample.height, width=sample.width, ref=ray.put(data))
            self._kept[sample.image_path] = handle
        return self._kept[sample.image_path]


def fetch(ref: Any) -> bytes:
    """Encoded bytes, out of the object store where `ref` is a reference. Raises TimeoutError."""
    if not isinstance(ref, ray.ObjectRef):
        return bytes(ref) if not isinstance(ref, bytes) else ref
    try:
        data: bytes = ray.get(ref, timeout=FETCH_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError as error:
        raise TimeoutError(f"an image did not come out of the object store within {FETCH_TIMEOUT_S:g} s") from error
    return data
