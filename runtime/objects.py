"""Encoded images, fetched where they are needed."""

import ray
from ray.exceptions import GetTimeoutError

from perception import images
from perception.types import ImageHandle, ImageSource, Sample

FETCH_TIMEOUT_S = 60.0


def handle(sample: Sample) -> ImageHandle:
    """A sample's image. Whoever needs the pixels reads them from their source: nothing is kept or sent here."""
    key = images.source_key(sample.image)
    return ImageHandle(key=key, height=sample.height, width=sample.width, ref=sample.image)


def fetch(handle: ImageHandle) -> bytes:
    """The encoded image. Raises RuntimeError naming it when the object store does not give it in time, OSError or
    DataError when its source cannot be read any more."""
    if isinstance(handle.ref, ImageSource):
        return images.read(handle.ref)
    if not isinstance(handle.ref, ray.ObjectRef):
        return handle.ref
    try:
        return ray.get(handle.ref, timeout=FETCH_TIMEOUT_S)
    except GetTimeoutError as error:
        raise RuntimeError(f"image {handle.key} did not come from Ray's store in {FETCH_TIMEOUT_S:g} s") from error
