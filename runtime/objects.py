"""Images out of Ray's object store."""

from __future__ import annotations

import ray
from ray.exceptions import GetTimeoutError

from perception.types import ImageHandle

FETCH_TIMEOUT_S = 60.0


def fetch(handle: ImageHandle) -> bytes:
    """The encoded image. Raises RuntimeError naming it when the object store does not give it in time."""
    if not isinstance(handle.ref, ray.ObjectRef):
        return handle.ref
    try:
        return ray.get(handle.ref, timeout=FETCH_TIMEOUT_S)
    except GetTimeoutError as error:
        raise RuntimeError(f"image {handle.key} did not come from Ray's store in {FETCH_TIMEOUT_S:g} s") from error
