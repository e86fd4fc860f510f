"""Transport of weights, both ends: parameters -> flat buckets -> an engine, by file, CUDA IPC or broadcast.

The learner's end (`learner.weights`) plans buckets, fills them and hands them over; the engine's worker
(`rollout.worker_extension`) takes them into an `Inbox`. Both ends sum up what they hold with `checksum`.
"""

import math
import pickle
import re
import shutil
import socket
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from perception.weights import TensorSlot, WeightBucket

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
ALIGNMENT = 16
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_DEVICE_ARGUMENT = 6
"""Position of the device index in the arguments of torch's `rebuild_cuda_tensor`."""
_SPARE_BYTES = 2 << 30
"""A GPU with less memory left keeps received weights on the host."""
_JOIN_S = 120.0
"""Longest wait for the members of a broadcast to meet; an engine joins with its first bucket."""


def plan_buckets(shapes: Shapes, limit: int, transport: str) -> list[WeightBucket]:
    """Cut parameters, in order, into buckets of at most `limit` bytes; their payload is still None.

    A larger parameter gets a bucket of its own. The docstring of `WeightBucket` has an example.
    """
    plans: list[WeightBucket] = []
    for name, (shape, dtype) in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if not plans or _aligned(plans[-1].nbytes) + size > limit:
            plans.append(WeightBucket(slots=(), nbytes=0, transport=transport))
        offset = _aligned(plans[-1].nbytes)
        slot = TensorSlot(name=name, dtype=str(dtype).removeprefix("torch."), shape=shape, offset=offset)
        plans[-1] = replace(plans[-1], slots=(*plans[-1].slots, slot), nbytes=offset + size)
    return plans


def plan_storages(parameters: Mapping[str, Tensor]) -> list[WeightBucket]:
    """The parameters where they are: a bucket for every storage they are contiguous views of, such as ZeRO's flat
    buffers. It is the memory of any of its parameters (`storage`)."""
    plans: dict[int, WeightBucket] = {}
    for name, parameter in parameters.items():
        whole, dtype = parameter.untyped_storage(), str(parameter.dtype).removeprefix("torch.")
        offset = int(parameter.storage_offset()) * parameter.element_size()
        slot = TensorSlot(name=name, dtype=dtype, shape=tuple(parameter.shape), offset=offset)
        plan = plans.get(whole.data_ptr(), WeightBucket(slots=(), nbytes=whole.nbytes(), transport="ipc"))
        plans[whole.data_ptr()] = replace(plan, slots=(*plan.slots, slot))
    return list(plans.values())


def storage(parameter: Tensor) -> Tensor:
    """The bytes of the storage that the parameter is a view of, (nbytes,) uint8, sharing its memory."""
    return torch.empty(0, dtype=torch.uint8, device=parameter.device).set_(parameter.untyped_storage())


def fill(plan: WeightBucket, parameters: Mapping[str, Tensor], buffer: Tensor) -> Tensor:
    """Copy the plan's parameters into `buffer`, uint8 of at least nbytes; returns the part used, (nbytes,) uint8."""
    for slot in plan.slots:
        view(buffer, slot).copy_(parameters[slot.name].detach())
    return buffer[: plan.nbytes]


def view(buffer: Tensor, slot: TensorSlot) -> Tensor:
    """The slot's tensor, sharing memory with the flat uint8 buffer."""
    dtype: torch.dtype = getattr(torch, slot.dtype)
    size = torch.Size(slot.shape).numel() * dtype.itemsize
    return buffer[slot.offset : slot.offset + size].view(dtype).view(slot.shape)


def checksum(tensors: Iterable[tuple[str, Tensor]]) -> int:
    """The sum of named tensors on any device. An engine may stack them by rows (q over k over v) without changing it.

    Each tensor counts as the weighted sum, mod 2**64, of its columns, themselves the sums over its rows of the bit
    patterns as signed integers; a vector is one column. The weight of a column depends on its number and on the layer
    numbers in the name. It is odd, so a single changed element always shows, and it comes from SplitMix64 (Steele et
    al., 2014, "Fast splittable pseudorandom number generators"), so that errors cannot be expected to cancel. Rows of
    zeros count nothing: an engine may pad with them.
    """
    return total(shard_sum(name, tensor) for name, tensor in tensors)


def shard_sum(name: str, shard: Tensor, *, column: int = 0, copy: int = 0, copies: int = 1) -> int:
    """What a shard of a tensor adds to the `checksum` of the whole, mod 2**64.

    `column`: the number of its first column. Where `copies` workers hold the same shard it counts `copies` times in
    copy 0 and -1 times in the others: equal copies add up to one, and one that differs shows.
    """
    rows = shard.detach().reshape(len(shard) if shard.ndim > 1 else -1, math.prod(shard.shape[1:]))
    columns = rows.view(_INTEGERS[shard.element_size()]).sum(0, dtype=torch.int64).cpu().numpy()
    seed = zlib.crc32(" ".join(re.findall(r"\d+", name)).encode())
    numbers = np.arange(column + 1, column + len(columns) + 1, dtype=np.uint64)
    mixed = (numbers + np.uint64(seed << 32)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    weights = (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)
    return int((columns.astype(np.uint64) * weights).sum()) * (-1 if copy else copies)


def total(sums: Iterable[int]) -> int:
    """The checksum of several sets of tensors, from theirs."""
    return sum(sums) % (1 << 64)


def shared_file(payload: Any) -> IO[bytes]:
    """A file that holds a payload of bytes until it is closed, for `Inbox.take` in another process of this machine.

    In shared memory where there is room (containers often have 64 MiB), else in the folder for temporary files.
    """
    content, memory = memoryview(payload), Path("/dev/shm")
    room = memory.is_dir() and shutil.disk_usage(memory).free > content.nbytes
    file = tempfile.NamedTemporaryFile(dir=memory if room else None, prefix="relook-weights-")  # noqa: SIM115
    file.write(content)
    file.flush()
    return file


def ipc_handle(buffer: Tensor) -> dict[str, bytes]:
    """A CUDA tensor for other processes on its GPU, under that GPU's UUID; the buffer must outlive its use there."""
    return {_uuid(buffer.device): pickle.dumps(reduce_tensor(buffer))}


def open_ipc(handles: Mapping[str, bytes]) -> Tensor:
    """The tensor of the `ipc_handle` made on this process's GPU, without a copy. Raises RuntimeError if none was."""
    here = torch.cuda.current_device()
    if (uuid := _uuid(here)) not in handles:
        there = ", ".join(handles)
        raise RuntimeError(f"placement.transport=ipc: weights lie on GPU {there} and this engine is on GPU {uuid}")
    rebuild, (*arguments,) = pickle.loads(handles[uuid])
    arguments[_DEVICE_ARGUMENT] = here  # processes number their visible devices differently
    return rebuild(*arguments)


def open_store(host: str, world: int, timeout_s: float) -> dist.TCPStore:
    """A rendezvous on a free port of the address `host` alone; torch's own would listen on every address."""
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port, limit = listener.getsockname()[1], timedelta(seconds=timeout_s)
    return dist.TCPStore(host, port, world, True, limit, wait_for_workers=False, master_listen_fd=listener.detach())


def join_store(host: str, port: int, world: int, timeout_s: float) -> dist.TCPStore:
    """The rendezvous that another process has opened."""
    return dist.TCPStore(host, port, world, False, timedelta(seconds=timeout_s))


class Broadcast:
    """A member of the process group in which member 0 broadcasts weights. It joins, sends and receives in a thread.

    NCCL makes its connections in the first broadcast, and waits for ever for a member that is gone: so all meet in the
    store first, and who waits for a bucket has a limit, after which `close` ends what hangs.
    """

    def __init__(
        self, store: Callable[[], dist.Store], member: int, world: int, timeout_s: float, device: torch.device | None
    ) -> None:
        """`device`: NCCL takes buckets from this GPU, or puts them there; None: gloo, which does so in host memory."""
        self._world, self._timeout_s, self._device = world, timeout_s, device
        self._thread = ThreadPoolExecutor(1, initializer=None if device is None else partial(_use, device))
        self._process_group = self._thread.submit(self._join, store, member)

    def send(self, flat: Tensor) -> Callable[[], None]:
        """Start on (nbytes,) uint8, which must stay as it is until the function returned, which waits, has returned.

        That raises TimeoutError when not all members joined, or took the bucket, in time.
        """
        return partial(self._sent, self._thread.submit(self._send, flat))

    def receive(self, nbytes: int) -> Future[Tensor]:
        """The next bucket, (nbytes,) uint8."""
        return self._thread.submit(self._receive, nbytes)

    def close(self) -> None:
        """Leave the group without waiting for members that may be gone."""
        if self._process_group.done() and self._process_group.exception() is None:
            self._process_group.result().abort()
        self._thread.shutdown(wait=False)

    def _join(self, store: Callable[[], dist.Store], member: int) -> Any:
        met, seconds = store(), min(self._timeout_s, _JOIN_S)
        met.set(str(member), "here")
        try:
            met.wait([str(other) for other in range(self._world)], timedelta(seconds=seconds))
        except dist.DistStoreError as error:
            joined = sum(met.check([str(other)]) for other in range(1, self._world))
            missing = f"not all of {self._world - 1} engines joined the weight broadcast in {seconds:g} s: {joined} did"
            raise TimeoutError(missing) from error
        limit = timedelta(seconds=self._timeout_s)
        if self._device is None:
            return dist.ProcessGroupGloo(met, member, self._world, limit)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = 2 * limit  # its watchdog ends the whole process: the limits of who waits come first
        return dist.ProcessGroupNCCL(met, member, self._world, options)

    def _sent(self, sending: Future[None]) -> None:
        wait([self._process_group])  # has limits of its own
        if not wait([sending], self._timeout_s).done:
            self.close()
            late = f"in {self._timeout_s:g} s: one of them is gone or hangs"
            raise TimeoutError(f"a weight bucket was not broadcast to all of {self._world - 1} engines {late}")
        sending.result()

    def _send(self, flat: Tensor) -> None:
        self._broadcast(flat.cpu() if self._device is None else flat)

    def _receive(self, nbytes: int) -> Tensor:
        if self._device is None:
            return self._broadcast(_in_host_memory(nbytes))
        flat = self._broadcast(torch.empty(nbytes, dtype=torch.uint8, device=self._device))
        if torch.cuda.mem_get_info()[0] < _SPARE_BYTES:
            flat = _in_host_memory(nbytes).copy_(flat)
        return flat

    def _broadcast(self, flat: Tensor) -> Tensor:
        self._process_group.result().broadcast(flat, 0).wait()
        if self._device is not None:
            torch.cuda.current_stream().synchronize()  # NCCL's `wait` has only queued it there
        return flat


class Inbox:
    """The buckets of one update, held by an engine's worker until it loads them."""

    def __init__(self) -> None:
        self._held: list[tuple[Future[Tensor], Sequence[TensorSlot]]] = []
        self._broadcasts: dict[tuple[Any, ...], Broadcast] = {}
        """The one joined last, by what it was joined with."""

    def take(self, transport: str, payload: Any, nbytes: int, slots: Sequence[TensorSlot]) -> None:
        """Take a bucket of `nbytes` bytes.

        `payload`: store: the path of a `shared_file`, which may then be closed. ipc: the `ipc_handle`s. nccl, gloo:
        (host, port, members, receiver, timeout in seconds) of the process group whose next broadcast is this bucket.
        """
        flat: Future[Tensor] = Future()
        if transport == "store":
            flat.set_result(torch.from_file(payload, shared=False, size=nbytes, dtype=torch.uint8))
        elif transport == "ipc":
            flat.set_result(open_ipc(payload))
        else:
            flat = self._member(transport, *payload).receive(nbytes)
        self._held.append((flat, slots))

    def all_arrived(self) -> bool:
        """Whether every bucket taken is here. Raises what went wrong with one that will not come."""
        return all(flat.done() and flat.result() is not None for flat, _ in self._held)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by name, sharing memory with the buckets. Waits for those that have not arrived."""
        for flat, slots in self._held:
            for slot in slots:
                yield slot.name, view(flat.result(), slot)

    def clear(self) -> None:
        """Let go of all buckets, and of the GPU memory they took."""
        if self._held:
            self._held.clear()
            torch.cuda.empty_cache()

    def _member(self, transport: str, host: str, port: int, world: int, receiver: int, timeout_s: float) -> Broadcast:
        membership = (transport, host, port, world, receiver, timeout_s)
        if membership not in self._broadcasts:
            for left in self._broadcasts.values():
                left.close()
            store = partial(join_store, host, port, world, timeout_s)
            here = torch.device("cuda", torch.cuda.current_device()) if transport == "nccl" else None
            self._broadcasts = {membership: Broadcast(store, receiver, world, timeout_s, here)}
        return self._broadcasts[membership]


def _use(device: torch.device) -> None:
    """What this thread does on the GPU, it does on this one and beside the stream on which the model is sampling."""
    torch.cuda.set_device(device)
    torch.cuda.set_stream(torch.cuda.Stream(device))


def _in_host_memory(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def _uuid(device: torch.device | int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
