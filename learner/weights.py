"""What the engine holds, made of what the learner has: plain parameters, or base weights with LoRA adapters merged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learner.zero import full_shape

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
        if _BASE not in name:
            found[name] = Weight(base=parameter)
            continue
        layer, kind = name.split(_BASE)
        if kind != "weight":
            found[f"{layer}.{kind}"] = Weight(base=parameter)
            continue
        adapter = f"{layer}{_DOWN}default.weight", f"{layer}{_UP}default.weight"
        found[f"{layer}.weight"] = Weight(
            base=parameter,
            down=parameters[adapter[0]],
            up=parameters[adapter[1]],
            scaling=float(model.get_submodule(layer).scaling["default"]),  # type: ignore[index, union-attr]
        )
    return found
