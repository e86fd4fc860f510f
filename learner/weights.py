"""The learner's weights as the engine takes them, LoRA adapters merged, and their sending."""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from torch import Tensor, nn

from learner.zero import full_shape, gathered
from perception.config import LearnerConfig
from perception.types import WeightBucket
from runtime.weights import Broadcast, checksum, fill, ipc_handle, open_store, plan_buckets, total, view

_BROADCASTS = ("nccl", "gloo")
_BASE, _UP, _DOWN = ".base_layer.", ".lora_B.", ".lora_A."


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One tensor of the engine."""

    base: nn.Parameter
    down: nn.Parameter | None = None
    """LoRA A, (rank, in)."""
    up: nn.Parameter | None = None
    """LoRA B, (out, rank)."""
    scaling: float = 0.0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What must be gathered before `value`."""
        return [p for p in (self.base, self.down, self.up) if p is not None]

    @property
    def trained(self) -> bool:
        return any(p.requires_grad for p in self.parameters)

    @property
    def shape(self) -> tuple[int, ...]:
        return full_shape(self.base)

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @torch.no_grad()
    def value(self) -> Tensor:
        """The whole tensor, in the base's dtype: base + scaling * up @ down, the product in float32."""
        base = self.base.detach()
        if self.down is None or self.up is None:
            return base
        update = self.up.detach().float() @ self.down.detach().float()
        return torch.add(base.float(), update, alpha=self.scaling).to(base.dtype)


def weights(model: nn.Module) -> dict[str, Weight]:
    """By the name the parameter has without adapters, in the order of `named_parameters()`; tied ones once."""
    parameters = dict(model.named_parameters())
    found: dict[str, Weight] = {}
    for name, parameter in parameters.items():
        if _UP in name or _DOWN in name:
            continue
        layer, adapted, kind = name.partition(_BASE)
        if not adapted or kind != "weight":
            found[name.replace(_BASE, ".")] = Weight(base=parameter)
            continue
        down, up = (parameters[f"{layer}{part}default.weight"] for part in (_DOWN, _UP))
        scaling = float(model.get_submodule(layer).scaling["default"])  # type: ignore[index, union-attr]
        found[f"{layer}.weight"] = Weight(base=parameter, down=down, up=up, scaling=scaling)
    return found


class WeightSender:
    """The weights of one rank on their way to the engines; only what is trained is sent.

    A sync is `open`, every `fill_bucket` in order, `flush`, and `release` once the engines have loaded the weights.
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
        self._broadcast: Broadcast | None = None
        self._receivers: tuple[str, ...] = ()
        self._frozen: int | None = None

    def open(self, receivers: tuple[str, ...]) -> int:
        """The number of buckets. Rank 0.

        `receivers` names the engines that will take them, in the order of their members 1, 2, ... of a broadcast; a new
        name, as that of a restarted engine, makes a new process group.
        """
        if self._transport in _BROADCASTS and self._receivers != receivers:
            if self._broadcast is not None:
                self._broadcast.close()
            host, world, limit = ray.util.get_node_ip_address(), len(receivers) + 1, self._config.timeout_s
            store = open_store(host, world, limit)
            self._broadcast = Broadcast(self._transport, lambda: store, 0, world, limit)
            self._receivers, self._address = receivers, (host, store.port, world)
        return len(self._plans)

    def fill_bucket(self, index: int) -> WeightBucket | None:
        """Bucket `index` of the current weights, on rank 0, under way if it is broadcast; None elsewhere. Collective.

        With CUDA IPC all buckets stay valid until `release`. Else there are two buffers, and a bucket has left this
        process before its buffer is filled anew.
        """
        plan = self._plans[index]
        sums = self._frozen_sum() if self._config.checksum and index == 0 else 0
        with gathered([p for slot in plan.slots for p in self._weights[slot.name].parameters]):
            if self._rank > 0:
                return None
            values = {slot.name: self._weights[slot.name].value() for slot in plan.slots}
            flat = fill(plan, values, self._buffer(index))
        if self._config.checksum:
            sums = total((sums, checksum((slot.name, view(flat, slot)) for slot in plan.slots)))
        return replace(plan, payload=self._send(index, flat), checksum=sums if self._config.checksum else None)

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

    def _plan(self, *, trained: bool) -> list[WeightBucket]:
        shapes = {name: (w.shape, w.dtype) for name, w in self._weights.items() if w.trained is trained}
        return plan_buckets(shapes, self._config.bucket_mb << 20, self._transport)

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
            plans = self._plans[index : index + 1] if self._transport == "ipc" else self._plans
            size = max(plan.nbytes for plan in plans)
            self._buffers[place] = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._buffers[place]

    def _send(self, index: int, flat: Tensor) -> Any:
        """The payload of a bucket (see `WeightBucket`)."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if self._transport == "ipc":
            return ipc_handle(flat)
        if self._broadcast is None:
            return ray.put(flat.cpu().numpy())
        self._sending[index % 2] = self._broadcast.send(flat)
        return self._address
