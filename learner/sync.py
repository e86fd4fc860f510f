"""Weights out: parameters -> a few flat buckets, never one message per parameter."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from learner.weights import Weight
from learner.zero import gathered
from perception.checksum import tensor_sum, total
from perception.config import LearnerConfig
from perception.types import TensorSlot, WeightBucket

ALIGNMENT = 16
_BROADCASTS = ("nccl", "gloo")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    if slots:
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


def checksum(tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Of named tensors on any device, for `WeightBucket.checksum`."""
    return total(tensor_sum(name, _column_sums(tensor)) for name, tensor in tensors)


class WeightSender:
    """The weights of one rank on their way to the engines; only what is trained is sent.

    A sync is `open`, every `pack_bucket` in order, `flush`, and `release` once the engines have loaded the weights.
    """

    def __init__(
        self, weights: Mapping[str, Weight], config: LearnerConfig, *, rank: int, device: torch.device, transport: str
    ) -> None:
        """`transport` as in `perception.config.PlacementConfig`."""
        self._weights, self._config = weights, config
        self._rank, self._device, self._transport = rank, device, transport
        self._plans = self._plan(trained=True)
        self._buffers: dict[int, Tensor] = {}
        self._sending: dict[int, Future[None]] = {}
        self._broadcast: _Broadcast | None = None
        self._frozen: int | None = None

    def open(self, receivers: tuple[str, ...]) -> int:
        """The number of buckets. Rank 0.

        `receivers` names the engines that will take them, in the order of their ranks 1, 2, ... in a broadcast; a new
        name, as that of a restarted engine, makes a new process group.
        """
        if self._transport in _BROADCASTS and (self._broadcast is None or self._broadcast.receivers != receivers):
            if self._broadcast is not None:
                self._broadcast.close()
            self._broadcast = _Broadcast(self._transport, receivers, self._device, self._config.timeout_s)
        return len(self._plans)

    def pack_bucket(self, index: int) -> WeightBucket | None:
        """Bucket `index` of the current weights, on rank 0, under way if it is broadcast; None elsewhere. Collective.

        With CUDA IPC all buckets stay valid until `release`. Else there are two buffers, and a bucket has left this
        process before its buffer is packed anew.
        """
        plan = self._plans[index]
        sums = self._frozen_sum() if self._config.checksum and index == 0 else 0
        with gathered([p for slot in plan.slots for p in self._weights[slot.name].parameters]):
            if self._rank > 0:
                return None
            values = {slot.name: self._weights[slot.name].value() for slot in plan.slots}
            packed = pack(plan, values, self._buffer(index))
        if self._config.checksum:
            sums = total((sums, checksum((slot.name, view(packed, slot)) for slot in plan.slots)))
        return WeightBucket(
            slots=plan.slots,
            nbytes=plan.nbytes,
            transport=self._transport,
            payload=self._send(index, packed),
            checksum=sums if self._config.checksum else None,
        )

    def flush(self) -> None:
        """Wait until every bucket that is broadcast has left. Rank 0."""
        while self._sending:
            self._sending.popitem()[1].result()

    def release(self) -> None:
        """Free the buffers. Rank 0."""
        self._buffers.clear()
        if self._transport == "ipc":
            torch.cuda.ipc_collect()

    def whole(self) -> dict[str, Tensor]:
        """Every weight by name on the CPU, also the frozen ones, adapters merged; {} on ranks > 0. Collective."""
        found: dict[str, Tensor] = {}
        for plan in self._plan(trained=True) + self._plan(trained=False):
            with gathered([p for slot in plan.slots for p in self._weights[slot.name].parameters]):
                if self._rank == 0:
                    found |= {s.name: self._weights[s.name].value().to("cpu", copy=True) for s in plan.slots}
        return found

    def _plan(self, *, trained: bool) -> list[BucketPlan]:
        shapes = {name: (w.shape, w.dtype) for name, w in self._weights.items() if w.trained is trained}
        return plan_buckets(shapes, self._config.bucket_mb << 20)

    def _frozen_sum(self) -> int:
        """Of the weights that are not trained, which every engine has read from disk. Collective the first time."""
        if self._frozen is None:
            sums = []
            for plan in self._plan(trained=False):
                with gathered([self._weights[slot.name].base for slot in plan.slots]):
                    if self._rank == 0:
                        sums.append(checksum((slot.name, self._weights[slot.name].value()) for slot in plan.slots))
            self._frozen = total(sums)
        return self._frozen

    def _buffer(self, index: int) -> Tensor:
        place = index if self._transport == "ipc" else index % 2
        if (sending := self._sending.pop(place, None)) is not None:
            sending.result()
        if place not in self._buffers:
            shared = max(plan.nbytes for plan in self._plans)
            size = self._plans[index].nbytes if self._transport == "ipc" else shared
            self._buffers[place] = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._buffers[place]

    def _send(self, index: int, packed: Tensor) -> Any:
        """The payload of a bucket (see `WeightBucket`)."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if self._transport == "ipc":
            return ipc_handle(packed)
        if self._broadcast is None:
            return ray.put(packed.cpu().numpy())
        self._sending[index % 2] = self._broadcast.send(packed)
        return self._broadcast.address


class _Broadcast:
    """Rank 0 of a process group of its own with the engines; joining and sending happen in a thread."""

    def __init__(self, transport: str, receivers: tuple[str, ...], device: torch.device, timeout_s: float) -> None:
        self.receivers = receivers
        self._nccl, self._device, self._timeout = transport == "nccl", device, timedelta(seconds=timeout_s)
        host, world = ray.util.get_node_ip_address(), len(receivers) + 1
        store = dist.TCPStore(host, 0, world, is_master=True, wait_for_workers=False, timeout=self._timeout)
        self.address = (host, store.port, world)
        self._thread = ThreadPoolExecutor(max_workers=1)
        make: Any = dist.ProcessGroupNCCL if self._nccl else dist.ProcessGroupGloo
        self._group = self._thread.submit(make, store, 0, world, self._timeout)

    def send(self, flat: Tensor) -> Future[None]:
        """Start on (nbytes,) uint8, which must stay as it is until the future is done."""
        return self._thread.submit(self._send, flat)

    def _send(self, flat: Tensor) -> None:
        try:
            group = self._group.result()
        except RuntimeError as error:
            late = f"not all of {len(self.receivers)} engines joined the broadcast of weights in {self._timeout}"
            raise TimeoutError(late) from error
        group.broadcast(flat if self._nccl else flat.cpu(), 0).wait()
        if self._nccl:
            torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        """Leave the group without waiting for engines that may be gone."""
        if self._group.done() and self._group.exception() is None:
            self._group.result().abort()
        self._thread.shutdown(wait=False)


def _column_sums(tensor: Tensor) -> np.ndarray:
    """(columns,) int64: sums over rows of the bit patterns; a vector is one column."""
    rows = tensor.reshape(len(tensor), -1) if tensor.ndim > 1 else tensor.reshape(-1, 1)
    return rows.view(_INTEGERS[tensor.element_size()]).sum(0, dtype=torch.int64).cpu().numpy()


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
