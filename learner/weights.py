"""The learner's weights as the rollout engines take them, LoRA adapters merged, and their sending in buckets."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import ray
import torch
from torch import Tensor, nn

from learner.zero import full_shape, gathered
from perception.config import LearnerConfig
from perception.weights import WeightBucket
from runtime import weights as wire

_BROADCASTS = ("nccl", "gloo")
_BASE = ".base_layer."


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One parameter as a rollout engine has it, and what it is made from."""

    base: nn.Parameter
    adapters: Mapping[str, nn.Parameter] = field(default_factory=dict)
    """LoRA's, where it has any: lora_A (rank, in) and lora_B (out, rank)."""
    scaling: float = 0.0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that must be gathered before `value`."""
        return [self.base, *self.adapters.values()]

    @property
    def trained(self) -> bool:
        return any(p.requires_grad for p in self.parameters)

    @property
    def in_place(self) -> bool:
        """Whether the base, as it lies in memory, is `value`."""
        return not self.adapters and self.base.shape == full_shape(self.base) and self.base.is_contiguous()

    @torch.no_grad()
    def value(self) -> Tensor:
        """The whole tensor, in the base's dtype: base + scaling * B @ A, the product in float32."""
        base = self.base.detach()
        if not self.adapters:
            return base
        update = self.adapters["lora_B"].detach().float() @ self.adapters["lora_A"].detach().float()
        return torch.add(base.float(), update, alpha=self.scaling).to(base.dtype)


def weights(model: nn.Module) -> dict[str, Weight]:
    """Weights by the name the parameter has without adapters, in the order of `named_parameters()`; tied ones once."""
    parameters = dict(model.named_parameters())
    found: dict[str, Weight] = {}
    for name, parameter in parameters.items():
        if ".lora_" in name:
            continue
        layer, adapted, kind = name.partition(_BASE)
        if not adapted or kind != "weight":
            found[name.replace(_BASE, ".")] = Weight(base=parameter)
            continue
        own = {part: parameters[f"{layer}.{part}.default.weight"] for part in ("lora_A", "lora_B")}
        scaling = float(model.get_submodule(layer).scaling["default"])  # type: ignore[index, union-attr]
        found[f"{layer}.weight"] = Weight(base=parameter, adapters=own, scaling=scaling)
    return found


class WeightSender:
    """The weights of one rank on their way to the engines; only what is trained is sent.

    A sync is `open`, every `fill_bucket` in order, `flush`, and `release` once the engines have loaded the weights.
    Rank 0 sends them to all engines; by CUDA IPC every rank hands its own out to the engine on its GPU. There they are
    the parameters themselves, in ZeRO's flat buffers, if they are whole and as the engine has them: under ZeRO-3 or
    with LoRA a second copy is made of them.
    """

    def __init__(
        self, weights: Mapping[str, Weight], config: LearnerConfig, *, rank: int, device: torch.device, transport: str
    ) -> None:
        """`transport` as in `perception.config.PlacementConfig`."""
        self._weights, self._config = weights, config
        self._rank, self._device, self._transport = rank, device, transport
        self._gives = rank == 0 or transport == "ipc"
        self._in_place = transport == "ipc" and all(weight.in_place for weight in weights.values() if weight.trained)
        self._plans = self._plan(trained=True)
        self._handles: dict[int, dict[str, bytes]] = {}
        """By address."""
        self._buffers: dict[int, Tensor] = {}
        self._sending: dict[int, Callable[[], None]] = {}
        self._broadcast: wire.Broadcast | None = None
        self._receivers: tuple[str, ...] = ()

    def open(self, receivers: tuple[str, ...]) -> int:
        """The number of buckets. Rank 0.

        `receivers` names the engines that will take them, in the order of their members 1, 2, ... of a broadcast; a new
        name, as that of a restarted engine, makes a new process group.
        """
        if self._transport in _BROADCASTS and self._receivers != receivers:
            if self._broadcast is not None:
                self._broadcast.close()
            # Half of what the pool waits: the error of a broadcast that hangs says more, and comes first.
            host, world, limit = ray.util.get_node_ip_address(), len(receivers) + 1, self._config.timeout_s / 2
            store = wire.open_store(host, world, limit)
            device = self._device if self._transport == "nccl" else None
            self._broadcast = wire.Broadcast(lambda: store, 0, world, limit, device)
            self._receivers, self._address = receivers, (host, store.port, world)
        return len(self._plans)

    def fill_bucket(self, index: int) -> WeightBucket | None:
        """Bucket `index` of the current weights, under way if it is broadcast; None on a rank that gives none.
        Collective.

        With CUDA IPC all buckets stay valid until `release`. Else there are two buffers, and a bucket has left this
        process before its buffer is filled anew.
        """
        plan = self._plans[index]
        sums = [self._frozen_sum] if self._config.checksum and index == 0 else []
        with self._values(plan, self._gives) as values:
            if not self._gives:
                return None
            first = values[plan.slots[0].name]
            flat = wire.storage(first) if self._in_place else wire.fill(plan, values, self._buffer(index))
        plan = replace(plan, payload=self._send(index, flat))
        if not self._config.checksum or self._rank > 0:
            return plan
        sums.append(wire.checksum((slot.name, wire.view(flat, slot)) for slot in plan.slots))
        return replace(plan, checksum=wire.total(sums))

    def flush(self) -> None:
        """Wait until every bucket that is broadcast has left. Rank 0."""
        while self._sending:
            self._sending.popitem()[1]()

    def release(self) -> None:
        """Free the buffers."""
        self._buffers.clear()
        if self._transport == "ipc":
            torch.cuda.ipc_collect()

    def whole(self) -> dict[str, Tensor]:
        """Every weight by name on the CPU, also the frozen ones, adapters merged; {} on ranks > 0. Collective."""
        found: dict[str, Tensor] = {}
        for plan in self._plan(trained=True) + self._plan(trained=False):
            with self._values(plan, self._rank == 0) as values:
                found |= {name: value.to("cpu", copy=True) for name, value in values.items()}
        return found

    def adapters(self) -> dict[str, Tensor]:
        """LoRA's own weights on the CPU by peft's names; {} on ranks > 0 and without LoRA. Collective."""
        found: dict[str, Tensor] = {}
        for name, weight in self._weights.items():
            with gathered([*weight.adapters.values()]):
                for kind, part in weight.adapters.items() if self._rank == 0 else ():
                    found[f"base_model.model.{name[: -len('weight')]}{kind}.weight"] = part.detach().cpu().clone()
        return found

    def _plan(self, *, trained: bool) -> list[WeightBucket]:
        chosen = {name: weight.base for name, weight in self._weights.items() if weight.trained is trained}
        if self._in_place:
            return wire.plan_storages(chosen)
        shapes = {name: (full_shape(base), base.dtype) for name, base in chosen.items()}
        return wire.plan_buckets(shapes, self._config.bucket_mb << 20, self._transport)

    @contextmanager
    def _values(self, plan: WeightBucket, wanted: bool) -> Iterator[dict[str, Tensor]]:
        """The plan's weights by name, whole; {} where they are not wanted. Collective."""
        chosen = {slot.name: self._weights[slot.name] for slot in plan.slots}
        with gathered([parameter for weight in chosen.values() for parameter in weight.parameters]):
            yield {name: weight.value() for name, weight in chosen.items()} if wanted else {}

    @cached_property
    def _frozen_sum(self) -> int:
        """Checksum of the weights that are not trained, which every engine has read from disk. Collective."""
        sums = []
        for plan in self._plan(trained=False):
            with self._values(plan, self._rank == 0) as values:
                sums.append(wire.checksum(values.items()))
        return wire.total(sums)

    def _buffer(self, index: int) -> Tensor:
        place = index if self._transport == "ipc" else index % 2
        if place in self._sending:
            self._sending.pop(place)()
        if place not in self._buffers:
            size = self._plans[index].nbytes if self._transport == "ipc" else max(plan.nbytes for plan in self._plans)
            self._buffers[place] = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._buffers[place]

    def _send(self, index: int, flat: Tensor) -> Any:
        """The payload of a bucket (see `WeightBucket`)."""
        torch.get_device_module(self._device).synchronize()
        if self._transport == "ipc":
            place = flat.data_ptr()
            if not self._in_place or place not in self._handles:  # torch keeps an event for each one ever made
                self._handles[place] = wire.ipc_handle(flat)
            return self._handles[place]
        if self._broadcast is None:
            return ray.put(flat.cpu().numpy())
        self._sending[index % 2] = self._broadcast.send(flat)
        return self._address
