"""What vLLM's worker process learns for us: take new weights while it samples, load them into the paused model.

vLLM mixes `WeightReceiver` into its worker (`worker_extension_cls`); `RolloutEngine` calls it by name. Nothing in it
may share its name with anything of the worker's own.
"""

from __future__ import annotations

import ctypes
import itertools
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
import vllm.model_executor.layers.utils as vllm_layers
from torch.nn import functional
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform

from perception.checksum import tensor_sum, total

Slot = tuple[str, str, tuple[int, ...], int]
"""name, dtype, shape, byte offset: a `TensorSlot` as it crosses vLLM's message channel."""

_DEVICE_ARGUMENT = 6
"""Position of the device index in the arguments of torch's `rebuild_cuda_tensor`."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SPARE_BYTES = 2 << 30
"""A GPU with less memory left stages broadcast weights on the host."""
_PR_SET_PDEATHSIG = 1

# A killed actor takes this process with it; vLLM alone would leave the engine running, and holding its memory.
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _plain_linear(layer: Any, remove_weight: bool = False) -> None:
    layer.cpu_linear = functional.linear


class _CpuGenerator(torch.Generator):
    """vLLM rewinds a seeded request's generator when its prompt was only computed in part. torch's CPU generator cannot
    rewind and raises, which ends the engine; here the request goes on with the next random numbers instead."""

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        return self


# vLLM's CPU linears keep a packed copy of their weights, and nothing repacks the tied head when new weights come: it
# would silently go on with the old ones. Unpacked linears read the parameter itself. On CUDA nothing is packed.
if current_platform.is_cpu():
    vllm_layers.dispatch_cpu_unquantized_gemm = _plain_linear
    torch.Generator = _CpuGenerator  # type: ignore[misc]


def _tensors(flat: torch.Tensor, slots: Sequence[Slot]) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of the parameters in a flat uint8 buffer."""
    for name, dtype_name, shape, offset in slots:
        dtype: torch.dtype = getattr(torch, dtype_name)
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        yield name, flat[offset : offset + nbytes].view(dtype).view(*shape)


class WeightReceiver:
    model_runner: Any
    vllm_config: VllmConfig
    _relook_held: ClassVar[list[tuple[Future[torch.Tensor], Sequence[Slot]]]] = []
    _relook_inbox: _Inbox | None = None

    def hold_file(self, path: str, slots: Sequence[Slot]) -> None:
        """Take a bucket from a file of raw bytes (in shared memory, where the host has room for it), which may then be
        deleted."""
        size = Path(path).stat().st_size
        flat = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
        self._relook_held.append((_arrived(flat), slots))

    def hold_ipc(self, payload: bytes, slots: Sequence[Slot]) -> None:
        """Take a bucket that lies on this GPU. `payload`: pickled `reduce_tensor` of one flat uint8 CUDA tensor."""
        rebuild: Callable[..., torch.Tensor]
        rebuild, arguments = pickle.loads(payload)
        mine = list(arguments)
        mine[_DEVICE_ARGUMENT] = torch.cuda.current_device()  # processes number their visible devices differently
        flat = rebuild(*mine)
        self._relook_held.append((_arrived(flat), slots))

    def hold_broadcast(self, group: Sequence[Any], nbytes: int, slots: Sequence[Slot]) -> None:
        """Take the next bucket that rank 0 of the group broadcasts. `group`: the arguments of `_Inbox`."""
        inbox = self._relook_inbox
        if inbox is None or inbox.group != tuple(group):
            if inbox is not None:
                inbox.close()
            inbox = self._relook_inbox = _Inbox(*group)
        self._relook_held.append((inbox.expect(nbytes), slots))

    def drop_held(self) -> None:
        self._relook_held.clear()

    def all_held(self) -> bool:
        """Whether every bucket is here. Raises what went wrong with one that will not come."""
        return all(flat.done() and flat.result() is not None for flat, _ in self._relook_held)

    def load_held(self) -> None:
        """Load all buckets held. Returns when the copies have run, so that the sender may free its buffers.

        Raises ValueError for a name the model does not know.
        """
        held = itertools.chain.from_iterable(_tensors(flat.result(), slots) for flat, slots in self._relook_held)
        try:
            with torch.no_grad(), set_current_vllm_config(self.vllm_config):
                self.model_runner.get_model().load_weights(held)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        finally:
            self._relook_held.clear()

    def sum_weights(self) -> int:
        """Checksum of all parameters, tied ones once (`perception.checksum`)."""
        parameters = self.model_runner.get_model().named_parameters()
        return total(tensor_sum(name, _column_sums(parameter.detach())) for name, parameter in parameters)


class _Inbox:
    """This engine's place in the process group in which the learner broadcasts; joins and receives in a thread."""

    def __init__(self, transport: str, host: str, port: int, world: int, rank: int, timeout_s: float) -> None:
        self.group = (transport, host, port, world, rank, timeout_s)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._member = self._thread.submit(self._join)

    def expect(self, nbytes: int) -> Future[torch.Tensor]:
        """The next bucket, (nbytes,) uint8."""
        return self._thread.submit(self._receive, nbytes)

    def close(self) -> None:
        """Leave the group without waiting for members that may be gone."""
        if self._member.done() and self._member.exception() is None:
            self._member.result().abort()
        self._thread.shutdown(wait=False)

    def _join(self) -> Any:
        transport, host, port, world, rank, timeout_s = self.group
        timeout = timedelta(seconds=timeout_s)
        store = dist.TCPStore(host, port, world, is_master=False, timeout=timeout)
        make: Any = dist.ProcessGroupNCCL if transport == "nccl" else dist.ProcessGroupGloo
        return make(store, rank, world, timeout)

    def _receive(self, nbytes: int) -> torch.Tensor:
        member, cuda = self._member.result(), torch.cuda.is_available()
        if self.group[0] == "gloo":
            flat = torch.empty(nbytes, dtype=torch.uint8, pin_memory=cuda)
            member.broadcast(flat, 0).wait()
            return flat
        stream = torch.cuda.Stream()  # not the one on which the model is sampling
        with torch.cuda.stream(stream):
            flat = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
            member.broadcast(flat, 0).wait()
            if torch.cuda.mem_get_info()[0] < _SPARE_BYTES:
                flat = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).copy_(flat, non_blocking=True)
            stream.synchronize()
        return flat


def _arrived(flat: torch.Tensor) -> Future[torch.Tensor]:
    future: Future[torch.Tensor] = Future()
    future.set_result(flat)
    return future


def _column_sums(tensor: torch.Tensor) -> np.ndarray:
    """(columns,) int64: sums over rows of the bit patterns; a vector is one column."""
    rows = tensor.reshape(len(tensor), -1) if tensor.ndim > 1 else tensor.reshape(-1, 1)
    return rows.view(_INTEGERS[tensor.element_size()]).sum(0, dtype=torch.int64).cpu().numpy()
