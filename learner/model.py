"""What is done to a loaded policy before it is trained: adapters, frozen parts, recomputed and compiled layers."""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.modeling_layers import GradientCheckpointingLayer

from perception.config import LearnerConfig


def vision_tower(model: Any) -> nn.Module:
    """Raises ValueError where the model keeps it under none of the usual names."""
    for name in ("visual", "vision_tower", "vision_model"):
        if isinstance(tower := getattr(model.model, name, None), nn.Module):
            return tower
    raise ValueError(f"learner.freeze_vision: {type(model).__name__} has no vision tower known by name")


class _PatchProduct(nn.Conv3d):
    """A convolution of patches by kernels of a patch's size, as the matrix product that it is: several times faster."""

    def forward(self, patches: Tensor) -> Tensor:
        """(patches, channels, time, height, width) -> (patches, width of the tower)."""
        return linear(patches.flatten(1), self.weight.flatten(1), self.bias)


def multiply_patches(model: Any) -> None:
    """For the Qwen-VL families, whose processor cuts an image into patches."""
    tower: Any = vision_tower(model)
    tower.patch_embed.proj.__class__ = _PatchProduct


def add_lora(model: nn.Module, config: LearnerConfig) -> None:
    """Adapters on the language model's linear layers; everything else is frozen."""
    names = "|".join(config.lora.targets)
    adapters = PeftConfig(
        r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=rf".*language_model.*\.({names})"
    )
    inject_adapter_in_model(adapters, model)


def checkpoint_layers(model: Any, which: str) -> None:
    """selective: every other layer of the text model and of the vision tower."""
    if which == "off":
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers[1::2] if which == "selective" else ():
        layer.gradient_checkpointing = False


def compile_layers(model: Any, limit: int) -> None:
    """Text layers once per row length, vision blocks for any number of patches; at most `limit` graphs a function."""
    torch._dynamo.config.recompile_limit = limit
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=False)
    tower: Any = vision_tower(model)
    for block in tower.blocks:
        block.compile()
