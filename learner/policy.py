"""Policy of the learner: log-probs of sampled tokens under the distribution the rollout engine samples from."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft import LoraConfig as Adapters
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.modeling_layers import GradientCheckpointingLayer

from learner import families
from learner.families import Family, Fetch
from learner.head import VocabularyHead
from learner.packing import PackedBatch
from learner.rows import Layout, Picture, Piece
from perception.config import LearnerConfig, LoraConfig
from perception.errors import UserError
from perception.types import PolicySpec

if TYPE_CHECKING:
    from learner.families.generic import PaddedBatch

log = logging.getLogger(__name__)


class Policy(nn.Module, ABC):
    """An image-text model whose forward pass maps a micro-batch to log-probs and entropies of its N sampled tokens."""

    attention: ClassVar[Any] = "sdpa"
    padded: ClassVar[bool]

    def __init__(self, family: Family, temperature: float, config: LearnerConfig, entropy_gradient: bool) -> None:
        super().__init__()
        self.family, spec = family, family.spec
        self.model = AutoModelForImageTextToText.from_pretrained(
            spec.path, dtype=getattr(torch, spec.dtype), attn_implementation=self.attention, local_files_only=True
        )
        choose_trained(self.model, family, config)
        texts = self.model.get_decoder(), self.model.get_output_embeddings()
        text = {id(parameter) for module in texts for parameter in module.parameters()}
        self.vision_trained = any(p.requires_grad and id(p) not in text for p in self.model.parameters())
        """Whether anything is that makes images' features: beside some frozen towers, what projects them."""
        self.train()
        _checkpoint_layers(self.model, config.checkpointing)
        banned = torch.tensor(spec.banned_token_ids, dtype=torch.int64)
        linear = self.model.get_output_embeddings()
        self.head = VocabularyHead(linear, banned, temperature, entropy_gradient, config.compile)
        self.vocabulary: int = self.model.config.get_text_config().vocab_size
        self.images = self.images_known = 0
        self.layout = Layout(
            image_token_id=spec.image_token_id,
            shown_id=self.model.config.image_token_id,
            filler_id=spec.eos_token_ids[0],
            picture=family.picture,
        )

    @abstractmethod
    def collate(self, pieces: Sequence[Piece]) -> PackedBatch | PaddedBatch:
        """The micro-batch of these pieces; no piece: that of a rank without work."""

    @cached_property
    def blank(self) -> Picture:
        """The image of a rank without work: under ZeRO-3 every rank must run the vision tower."""
        return self.family.prepare("", torch.full((3, 56, 56), 200, dtype=torch.uint8))

    def use_adapters(self, used: bool) -> None:
        """Without them, a policy with LoRA is the one it started from."""
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(used)


def load_policy(
    spec: PolicySpec, temperature: float, config: LearnerConfig, fetch: Fetch, entropy_gradient: bool = False
) -> Policy:
    """The policy at `spec.path`, on packed rows where its family allows.

    Raises ValueError where an option asks for what the family does not have.
    """
    settings = AutoConfig.from_pretrained(spec.path, local_files_only=True)
    family = families.family_of(settings.model_type)(spec, settings, fetch)
    kind = family.policy(config.rows)
    if config.rows == "packed" and kind.padded:
        why = f"{settings.model_type} ({spec.path}) is of no family that packs, or has layers that do not"
        log.warning(f"learner: rows are padded, not packed: {why}. Each answer costs its prompt and images again.")
    return kind(family, temperature, config, entropy_gradient)


def choose_trained(model: nn.Module, family: Family | type[Family], config: LearnerConfig) -> None:
    """Freeze what is not trained, and add the adapters that are."""
    if config.freeze_vision:
        family.vision_tower(model).requires_grad_(False)
    if config.lora.rank:
        _check_targets(model, config.lora.targets, family.adapted)
        inject_adapter_in_model(adapters(config.lora, family), model)


def adapters(config: LoraConfig, family: Family | type[Family]) -> Adapters:
    """peft's settings of LoRA on the linear layers of the family's language model; all else is frozen."""
    layers = rf".*({family.adapted}).*\.({'|'.join(config.targets)})"
    return Adapters(r=config.rank, lora_alpha=config.alpha, target_modules=layers)


def _check_targets(model: nn.Module, targets: Sequence[str], within: str) -> None:
    """Raises UserError for a target that no linear layer is called by, inside the modules that `within` names."""
    linear = (name for name, one in model.named_modules() if isinstance(one, nn.Linear) and re.search(within, name))
    there = {name.rpartition(".")[2] for name in linear}
    if missing := [name for name in targets if name not in there]:
        known = ", ".join(sorted(there))
        raise UserError(f"learner.lora.targets: the language model has no linear layer {missing[0]} (it has {known})")


def _checkpoint_layers(model: Any, which: str) -> None:
    """selective: every other layer of the text model and of the vision tower."""
    if which == "off":
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers[1::2] if which == "selective" else ():
        layer.gradient_checkpointing = False
