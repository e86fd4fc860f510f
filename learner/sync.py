"""Weights out: parameters -> a few flat buckets, never one message per parameter."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from perception.types import TensorSlot

ALIGNMENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketPlan:
    slots: tuple[TensorSlot, ...]
    nbytes: int


def plan_buckets(shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], limit: int) -> list[BucketPlan]:
    """Cut parameters, in order, into buckets of at most `limit` bytes; a larger parameter gets a bucket of its own."""
    plans: list[BucketPlan] = []
    slots: list[TensorSlot] = []
    end = 0
    for name, (shape, dtype) in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if slots and _aligned(end) + size > limit:
            plans.append(BucketPlan(slots=tuple(slots), nbytes=end))
            slots, end = [], 0
        offset = _aligned(end)
        slots.append(TensorSlot(name=name, dtype=str(dtype).removeprefix("torch."), shape=shape, offset=offset))
        end = offset + size
    plans.append(BucketPlan(slots=tuple(slots), nbytes=end))
    return plans


def pack(plan: BucketPlan, parameters: Mapping[str, Tensor], buffer: Tensor) -> Tensor:
    """Copy the plan's parameters into `buffer`, uint8 of at least nbytes; returns the part used, (nbytes,) uint8."""
    for slot in plan.slots:
        view(buffer, slot).copy_(parameters[slot.name].detach())
    return buffer[: plan.nbytes]


def view(buffer: Tensor, slot: TensorSlot) -> Tensor:
    """The slot's tensor, sharing memory with the flat uint8 buffer."""
    dtype: torch.dtype = getattr(torch, slot.dtype)
    size = torch.Size(slot.shape).numel() * dtype.itemsize
    return buffer[slot.offset : slot.offset + size].view(dtype).view(slot.shape)


def ipc_handle(buffer: Tensor) -> bytes:
    """Pickled (rebuild, arguments) of a CUDA tensor; the buffer must outlive its use in the other process."""
    return pickle.dumps(reduce_tensor(buffer))


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
