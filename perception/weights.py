"""Weights on their way from the learner to the engines, and what an engine reports: more types that cross a process."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlot:
    """The place of one parameter inside a bucket's flat buffer (see the example of `WeightBucket`)."""

    name: str  # the policy's `named_parameters()` name
    dtype: str  # e.g. float32, bfloat16
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the buffer, a multiple of 16


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBucket:
    """A flat byte buffer of parameters on its way to an engine.

    A float32 bias of 3 (12 bytes) and a bfloat16 matrix of 2 x 2 (8 bytes) are

        slots = (TensorSlot(name="bias", dtype="float32", shape=(3,), offset=0),
                 TensorSlot(name="weight", dtype="bfloat16", shape=(2, 2), offset=16))
        nbytes = 24

    in a buffer whose bytes 12 to 15 nobody reads.
    """

    slots: tuple[TensorSlot, ...]
    nbytes: int
    transport: str  # one of `perception.config.PlacementConfig`
    payload: Any = None
    """store: a (nbytes,) uint8 array, or an ObjectRef to one. ipc: CUDA IPC handles, by the UUID of the GPU that each
    is on. nccl, gloo: (host, port, members) of the process group in which the learner, member 0, broadcasts the buckets
    in order."""
    checksum: int | None = None  # of these parameters; the first bucket's counts the weights that are never sent, too


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    version: str  # vLLM's
    seconds: float  # from construction to ready


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """One weight sync, as one engine saw it."""

    version: int
    transfer_seconds: float  # from the first bucket to the pause: bytes on their way while sampling goes on
    pause_seconds: float  # while nothing was sampled
    nbytes: int
    checksum: int | None = None  # of all parameters the engine now holds, where it was asked for
