"""CUDA, its IPC and NCCL as the weight wire meets them, played on the CPU by the threads of one process.

Tensors of a GPU lie in host memory. A thread begins on GPU 0 and its default stream, whatever its maker uses.
"""

from __future__ import annotations

import pickle
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import reductions

from runtime import weights


@dataclass(eq=False)
class Stream:
    """Runs what was queued when it is synchronized, and not before."""

    device: int
    queue: list[Callable[[], None]] = field(default_factory=list)

    def synchronize(self) -> None:
        while self.queue:
            self.queue.pop(0)()


class Cuda:
    """What the product uses of `torch.cuda`."""

    def __init__(self, uuids: list[str]) -> None:
        """`uuids`: of the GPUs, in this process's numbering; another process's is played by another list."""
        self.uuids, self.free, self.emptied = uuids, 64 << 30, 0
        self.streams: list[Stream] = []
        self._thread = threading.local()
        self._default = defaultdict(lambda: Stream(self.current_device()))

    def Stream(self, device: torch.device) -> Stream:  # noqa: N802 - torch's name
        self.streams.append(Stream(_index(device)))
        return self.streams[-1]

    def current_device(self) -> int:
        return getattr(self._thread, "device", 0)

    def set_device(self, device: torch.device | int) -> None:
        self._thread.device = _index(device)

    def current_stream(self) -> Stream:
        return getattr(self._thread, "stream", None) or self._default[self.current_device()]

    def set_stream(self, stream: Stream) -> None:
        self._thread.stream = stream

    def get_device_properties(self, device: torch.device | int) -> Any:
        return SimpleNamespace(uuid=self.uuids[_index(device, self.current_device())])

    def mem_get_info(self) -> tuple[int, int]:
        return self.free, 80 << 30

    def is_available(self) -> bool:
        return False  # nothing can be pinned

    def empty_cache(self) -> None:
        self.emptied += 1

    def ipc_collect(self) -> None: ...


class Nccl:
    """`ProcessGroupNCCL`: made without meeting anyone; a broadcast is queued, and hangs until every member has come or
    the group is aborted."""

    class Options:
        _timeout: timedelta

    made: ClassVar[list[Nccl]] = []
    _boards: ClassVar[defaultdict[int, _Board]] = defaultdict(lambda: _Board())

    def __init__(self, store: Any, rank: int, size: int, options: Options) -> None:
        self.rank, self.options, self.used = rank, options, list[tuple[Stream, int]]()
        self._store, self._size, self._board, self._number = store, size, self._boards[store.port], 0
        self.aborted = threading.Event()
        self.made.append(self)

    def broadcast(self, tensor: Tensor, root: int) -> Any:
        stream: Any = torch.cuda.current_stream()
        self.used.append((stream, torch.cuda.current_device()))
        self._number += 1
        number = self._number
        stream.queue.append(lambda: self._move(tensor, root, number))
        return SimpleNamespace(wait=lambda: None)

    def abort(self) -> None:
        self.aborted.set()

    def _move(self, tensor: Tensor, root: int, number: int) -> None:
        if self.rank == root:
            self._board.sent[number] = tensor.clone()
        self._board.came[number].add(self.rank)
        while len(self._board.came[number]) < self._size:
            if self.aborted.wait(0.005):
                raise RuntimeError("NCCL communicator was aborted")
        if self.rank != root:
            tensor.copy_(self._board.sent[number])


class _Board:
    """What the members of one group know of each other, by the number of the broadcast."""

    def __init__(self) -> None:
        self.sent: dict[int, Tensor] = {}
        self.came: defaultdict[int, set[int]] = defaultdict(set)


class Ipc:
    """`reduce_tensor` of CUDA tensors: a handle opens their memory on whatever device its argument 6 names."""

    shared: ClassVar[list[Tensor]] = []

    @classmethod
    def reduce(cls, tensor: Tensor) -> tuple[Any, tuple[Any, ...]]:
        cls.shared.append(tensor)
        size, stride = tensor.size(), tensor.stride()
        return _rebuild, (Tensor, size, stride, tensor.storage_offset(), None, tensor.dtype, 99, len(cls.shared) - 1)


def _rebuild(*arguments: Any) -> Tensor:
    assert arguments[6] == torch.cuda.current_device()
    return Ipc.shared[arguments[7]]


def play_ipc(uuid: str) -> None:
    """For good, in a process of its own: its CPU tensors are on this GPU, and a handle holds a copy of them."""
    weights.reduce_tensor = lambda tensor: (_copied, (*[None] * 6, 0, tensor.numpy().copy()))  # type: ignore[assignment]
    weights._uuid = lambda device: uuid  # type: ignore[assignment]
    torch.cuda.ipc_collect = lambda: None  # type: ignore[assignment]


def opened(handle: bytes) -> Tensor:
    """What `play_ipc` has handed out."""
    rebuild, arguments = pickle.loads(handle)
    return rebuild(*arguments)


def _copied(*arguments: Any) -> Tensor:
    return torch.from_numpy(arguments[7].copy())


def _index(device: torch.device | int, current: int = 0) -> int:
    """A CPU tensor's device stands for the current GPU."""
    return device if isinstance(device, int) else current if device.index is None else device.index


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    """Three GPUs."""
    assert list(reductions.rebuild_cuda_tensor.__code__.co_varnames).index("storage_device") == weights._DEVICE_ARGUMENT
    played, empty = Cuda(["GPU-a", "GPU-b", "GPU-c"]), torch.empty

    def in_host_memory(*size: int, device: Any = None, **how: Any) -> Tensor:
        with suppress(TypeError):
            device = None if torch.device(device).type == "cuda" else device
        return empty(*size, device=device, **how)

    for name in vars(Cuda):
        if not name.startswith("_"):
            monkeypatch.setattr(torch.cuda, name, getattr(played, name))
    monkeypatch.setattr(torch, "empty", in_host_memory)
    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", Nccl, raising=False)
    monkeypatch.setattr(weights, "reduce_tensor", Ipc.reduce)
    monkeypatch.setattr(Nccl, "made", [])
    monkeypatch.setattr(Ipc, "shared", [])
    yield played
    for group in Nccl.made:
        group.abort()
