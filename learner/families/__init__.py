"""Model families of the learner, by `model_type`; what rollout and launch must know is in `perception/families.py`.

A model type that nothing is registered for is an ordinary image-text model, `Family`. A module of yours may add one:

    @register("my_model_type")
    class MyFamily(Family): ...

or, where its text model sees all that came before, `register("my_model_type")(learner.families.packed.Packed)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from learner.rows import Picture, Piece
from perception.images import pixels
from perception.registry import Registry
from perception.types import ImageHandle, PolicySpec
from runtime.processor import load_processor

if TYPE_CHECKING:
    from learner.policy import Policy

Fetch = Callable[[ImageHandle], bytes]
"""The encoded bytes of an image."""
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
"""Names under which a model is told which tokens are an image's: 1, others 0."""
_PROCESSOR = Lock()
"""Tokenizers must not be called by two threads at once."""


class Family:
    """All that the learner knows of a policy's family, made before the model is loaded. This base class serves any
    image-text model of transformers, on padded rows, by its own processor and forward pass."""

    adapted: ClassVar[str] = "language_model|text_model"
    """Regular expression: the modules in which LoRA adapts linear layers."""

    def __init__(self, spec: PolicySpec, config: Any, fetch: Fetch) -> None:
        """`config` is transformers'."""
        self.spec, self.config, self.fetch = spec, config, fetch
        self.processor = load_processor(spec.path, spec.pixels)

    def policy(self, rows: Literal["packed", "padded"]) -> type[Policy]:
        """The policy's class for such rows, or the one for padded rows where the model cannot be packed."""
        from learner.families.generic import PaddedPolicy  # builds on `learner.policy`, which knows this module

        return PaddedPolicy

    def picture(self, handle: ImageHandle) -> Picture:
        """The image as the model takes it. Called from several threads. Raises DataError where it cannot be read."""
        return self.prepare(handle.key, torch.tensor(pixels(handle, self.fetch)).permute(2, 0, 1))

    def prepare(self, key: str, pixels: Tensor) -> Picture:
        """(3, H, W) uint8 -> what the processor makes of one placeholder and this image, alone."""
        shown = {"text": [self.processor.image_token], "images": [pixels], "add_special_tokens": False}
        with _PROCESSOR:
            made = self.processor(**shown, return_tensors="pt")
        of_text = {*self.processor.tokenizer.model_input_names, *TOKEN_TYPES}
        inputs = {name: value for name, value in made.items() if name not in of_text}
        return Picture(key=key, tokens=made["input_ids"][0], inputs=inputs)

    @staticmethod
    def vision_tower(model: Any) -> nn.Module:
        """The module that `learner.freeze_vision` freezes. Raises ValueError where it has none of the usual names."""
        for name in ("visual", "vision_tower", "vision_model"):
            if isinstance(tower := getattr(model.model, name, None), nn.Module):
                return tower
        raise ValueError(f"learner.freeze_vision: {type(model).__name__} has no vision tower known by name")

    def flops(self, model: Any, vision_trained: bool, adapters: bool) -> Callable[[Sequence[Piece]], float] | None:
        """A counter of a micro-batch's useful FLOPs; None where there is none: the run then has no `learner/mfu`."""
        return None


FAMILIES: Registry[type[Family]] = Registry("model family")
register = FAMILIES.register


def family_of(model_type: str) -> type[Family]:
    from learner.families import qwen_vl  # noqa: F401 - it registers itself and all that pack, on `learner.policy`

    return FAMILIES[model_type] if model_type in FAMILIES else Family  # noqa: SIM401 - it has no `get`
