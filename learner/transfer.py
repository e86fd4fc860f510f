"""Tensors of the host on a device, without a wait."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def to_device(value: T, device: torch.device) -> T:
    """The value with its tensors on the device: itself, or those of a mapping's values or a dataclass's fields; what
    else it has stays where it is. CUDA copies from pinned memory while the host goes on."""
    moved: Any = value
    if isinstance(value, Tensor):
        host = value.pin_memory() if device.type == "cuda" and value.is_cpu else value
        moved = host.to(device, non_blocking=True)
    elif isinstance(value, Mapping):
        moved = {name: to_device(one, device) for name, one in value.items()}
    elif is_dataclass(value) and not isinstance(value, type):
        moved = replace(value, **{field.name: to_device(getattr(value, field.name), device) for field in fields(value)})
    return moved
