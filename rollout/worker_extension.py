"""Extension of vLLM's worker: it takes new weights while the engine samples and loads them into the paused model.

vLLM mixes `WeightReceiver` into its worker (`worker_extension_cls`), where `rollout.update` calls it by name; no name
in it may be one of the worker's own. The engine's process imports this file for `scheduler` (`scheduler_cls`).
"""

import ctypes
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import vllm._custom_ops as vllm_kernels
import vllm.model_executor.layers.utils as vllm_layers
import vllm.v1.core.sched.output as vllm_requests
from torch import Tensor
from torch.nn import Module, functional
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from perception.weights import TensorSlot
from runtime.tracing import Traced
from runtime.weights import Inbox, shard_sum, total

_PR_SET_PDEATHSIG = 1
torch.profiler.profile.should_annotate = False  # type: ignore[attr-defined]  # vLLM asks it; it names its steps itself

# A killed actor takes this process with it; vLLM alone would leave the engine running, and holding its memory.
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _plain_linear(layer: Any, remove_weight: bool = False) -> None:
    layer.cpu_linear = functional.linear


def _plain_convolution(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel of linear attention that is given, and told of, a weight (channels, 1, width) that nothing packed."""
    return lambda weight, is_weight_packed, **rest: kernel(weight=weight.flatten(1), is_weight_packed=False, **rest)


class _CpuGenerator(torch.Generator):
    """vLLM rewinds a seeded request's generator when its prompt was only computed in part. torch's CPU generator cannot
    rewind and raises, which ends the engine; here the request goes on with the next random numbers instead."""

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        return self


# vLLM's CPU linears keep a packed copy of their weights, and nothing repacks the tied head when new weights come: it
# would silently go on with the old ones. Unpacked linears read the parameter itself, and so do the convolutions of
# linear attention, whose new weights would not fit the packed ones. On CUDA nothing is packed.
if current_platform.is_cpu():
    vllm_layers.dispatch_cpu_unquantized_gemm = _plain_linear
    for name in ("causal_conv1d_fwd_cpu", "causal_conv1d_update_cpu"):
        setattr(vllm_kernels, name, _plain_convolution(getattr(vllm_kernels, name)))
    torch.Generator = _CpuGenerator  # type: ignore[misc]

# A request whose images lie wholly in the prefix cache is given to the worker without their pixels. A weight update
# empties that cache and computes the request anew, from its images: the engine died of it.
vllm_requests.strip_covered_mm_data = lambda features, *_, **__: features


def scheduler(vllm_config: VllmConfig, **arguments: Any) -> Scheduler:
    """vLLM's own. Named as `scheduler_cls`, it has the engine's process import this file, wherever the workers live."""
    kind = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    return kind(vllm_config=vllm_config, **arguments)


class WeightReceiver(Traced):
    model_runner: Any
    vllm_config: VllmConfig
    rank: int
    _relook_inbox: ClassVar[Inbox] = Inbox()
    _relook_schedule = staticmethod(torch.profiler.schedule(wait=0, warmup=0, active=64, repeat=1))

    def hold(self, transport: str, payload: Any, nbytes: int, slots: Sequence[Mapping[str, Any]]) -> None:
        """`Inbox.take`; `slots` are `TensorSlot`s as they leave vLLM's message channel.

        A broadcast's receiver is that of the engine's first worker.
        """
        if transport in ("nccl", "gloo"):
            host, port, members, receiver, timeout_s = payload
            payload = (host, port, members, receiver + self.rank, timeout_s)
        self._relook_inbox.take(transport, payload, nbytes, [TensorSlot(**slot) for slot in slots])

    def drop_held(self) -> None:
        self._relook_inbox.clear()

    def all_held(self) -> bool:
        """Whether every bucket is here. Raises what went wrong with one that will not come."""
        return self._relook_inbox.all_arrived()

    def load_held(self) -> None:
        """Load all buckets held. Returns when the copies have run, so that the sender may free its buffers.

        Raises ValueError for a name the model does not know.
        """
        try:
            with torch.no_grad(), set_current_vllm_config(self.vllm_config):
                if self.vllm_config.model_config.quantization:  # layer by layer, each quantised anew
                    self.model_runner.reload_weights(weights_iterator=self._relook_inbox.tensors())
                else:
                    self.model_runner.get_model().load_weights(self._relook_inbox.tensors())
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        finally:
            self._relook_inbox.clear()

    def trace(self, file: str = "") -> None:
        """`Traced.trace` of the engine's first worker, for 64 forward passes at most: vLLM steps `profiler` in each."""
        if self.rank == 0:
            super().trace(file)
            self.profiler = self._relook_profiler

    def sum_weights(self) -> int:
        """This worker's part of the checksum of all parameters, tied ones once; the workers' parts add up to it."""
        model, workers = self.model_runner.get_model(), self.vllm_config.parallel_config.tensor_parallel_size
        dtype = self.vllm_config.model_config.dtype  # the learner's; the decay of linear attention is kept in float32
        sums = []
        for name, parameter in model.named_parameters():
            layer = model.get_submodule(name.rpartition(".")[0])
            shards = _shards(layer, parameter, self.rank, workers)
            sums += [shard_sum(name, shard.to(dtype), **place) for shard, place in shards]
        return total(sums)


def _shards(layer: Module, parameter: Tensor, rank: int, workers: int) -> list[tuple[Tensor, dict[str, int]]]:
    """A worker's parameter in parts, each with its place in the whole (see `shard_sum`)."""
    split = getattr(layer, "tp_size", 1) > 1
    if split and isinstance(layer, RowParallelLinear) and parameter.ndim > 1:
        return [(parameter, {"column": rank * parameter.shape[1]})]
    if split and isinstance(layer, QKVParallelLinear):
        queries, copies = layer.num_heads * layer.head_size, layer.num_kv_head_replicas
        keys_and_values = {"copy": rank % copies, "copies": copies}
        return [(parameter[:queries], {}), (parameter[queries:], keys_and_values)]
    loader = str(getattr(parameter, "weight_loader", ""))  # of the single vectors of Qwen3.5's linear attention
    by_rows = isinstance(layer, (ColumnParallelLinear, VocabParallelEmbedding)) or "sharded_weight_loader" in loader
    return [(parameter, {} if split and by_rows else {"copy": rank, "copies": workers})]
