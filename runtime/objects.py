"""Encoded images in Ray's object store: put there once, fetched where they are needed."""

from pathlib import Path

import ray
from cachetools import LRUCache
from ray.exceptions import GetTimeoutError

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


def fetch(handle: ImageHandle) -> bytes:
    """The encoded image. Raises RuntimeError naming it when the object store does not give it in time."""
    if not isinstance(handle.ref, ray.ObjectRef):
        return handle.ref
    try:
        return ray.get(handle.ref, timeout=FETCH_TIMEOUT_S)
    except GetTimeoutError as error:
        raise RuntimeError(f"image {handle.key} did not come from Ray's store in {FETCH_TIMEOUT_S:g} s") from error
