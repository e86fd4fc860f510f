"""What vLLM's worker process learns for us: take a bucket of weights into the running model.

vLLM mixes `WeightReceiver` into its worker (`worker_extension_cls`); `RolloutEngine.load_bucket` calls it by name. No
method may share its name with one of the worker's own.
"""

from __future__ import annotations

import ctypes
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import vllm.model_executor.layers.utils as vllm_layers
from torch.nn import functional
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform

Slot = tuple[str, str, tuple[int, ...], int]
"""name, dtype, shape, byte offset: a `TensorSlot` as it crosses vLLM's message channel."""

_DEVICE_ARGUMENT = 6
"""Position of the device index in the arguments of torch's `rebuild_cuda_tensor`."""
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

    def receive_file(self, path: str, slots: Sequence[Slot]) -> None:
        """Load a bucket from a file of raw bytes (in shared memory, where the host has room for it).

        Raises ValueError for a name the model does not know.
        """
        size = Path(path).stat().st_size
        self._load(torch.from_file(path, shared=False, size=size, dtype=torch.uint8), slots)

    def receive_ipc(self, payload: bytes, slots: Sequence[Slot]) -> None:
        """Load a bucket that lies on this GPU. `payload`: pickled `reduce_tensor` of one flat uint8 CUDA tensor.

        Returns when the copies have run, so that the sender may overwrite its buffer.
        """
        rebuild: Callable[..., torch.Tensor]
        rebuild, arguments = pickle.loads(payload)
        mine = list(arguments)
        mine[_DEVICE_ARGUMENT] = torch.cuda.current_device()  # processes number their visible devices differently
        self._load(rebuild(*mine), slots)
        torch.cuda.synchronize()

    def _load(self, flat: torch.Tensor, slots: Sequence[Slot]) -> None:
        with torch.no_grad(), set_current_vllm_config(self.vllm_config):
            self.model_runner.get_model().load_weights(_tensors(flat, slots))
