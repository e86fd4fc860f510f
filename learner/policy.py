"""The policy as the learner sees it: log-probs of sampled tokens under the distribution the engine samples from."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from cachetools import LRUCache
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from learner import model, text_attention, vision_attention
from learner.head import Head
from learner.packing import PackedBatch, pack
from learner.padding import PaddedBatch, pad
from learner.rows import Layout, Picture, Piece
from perception.config import LearnerConfig
from perception.images import decode
from perception.types import ImageHandle, PolicySpec

PACKED_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
ROW_BUCKETS = 16
"""Lengths of rows within `micro_tokens` that are compiled for on CUDA, at most."""
log = logging.getLogger(__name__)
Fetch = Callable[[ImageHandle], bytes]
"""The encoded bytes of an image."""


class Policy(nn.Module, ABC):
    """An image-text model whose forward pass maps a micro-batch to log-probs and entropies of its N sampled tokens."""

    attention: ClassVar[Any] = "sdpa"
    padded: ClassVar[bool]

    def __init__(
        self, spec: PolicySpec, temperature: float, config: LearnerConfig, fetch: Fetch, entropy_gradient: bool = False
    ) -> None:
        super().__init__()
        self.model = AutoModelForImageTextToText.from_pretrained(
            spec.path, dtype=getattr(torch, spec.dtype), attn_implementation=self.attention, local_files_only=True
        )
        self.vision_trained = not config.freeze_vision and not config.lora.rank
        if config.freeze_vision:
            model.vision_tower(self.model).requires_grad_(False)
        if config.lora.rank:
            model.add_lora(self.model, config)
        self.train()
        model.checkpoint_layers(self.model, config.checkpointing)
        self.head = Head(
            self.model.get_output_embeddings(),
            torch.tensor(spec.banned_token_ids, dtype=torch.int64),
            temperature,
            entropy_gradient,
            config.compile,
        )
        self.vocabulary: int = self.model.config.get_text_config().vocab_size
        self.features: LRUCache[str, Picture] = LRUCache(config.feature_cache_mb << 20, _feature_bytes)
        """Of images seen before, where the vision tower is frozen."""
        self.images = self.images_known = 0
        self.layout = Layout(
            image_token_id=spec.image_token_id,
            filler_id=spec.eos_token_ids[0],
            picture=_picture_maker(spec, fetch, self.features),
            positions=None if self.padded else self.positions,
        )

    @abstractmethod
    def collate(self, pieces: Sequence[Piece]) -> PackedBatch | PaddedBatch:
        """The micro-batch of these pieces; of none, that of a rank without work."""

    def use_adapters(self, used: bool) -> None:
        """Without them, a policy with LoRA is the one it started from."""
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(used)

    def positions(self, ids: Tensor, grids: Tensor) -> Tensor:
        """M-RoPE positions (3, T) of expanded ids (T,) holding the images of `grids` (images, 3)."""
        is_image = (ids == self.model.config.image_token_id).to(torch.int32)
        positions, _ = self.model.model.get_rope_index(ids[None], is_image[None], image_grid_thw=grids)
        return positions[:, 0]


class PaddedPolicy(Policy):
    """Any image-text model of transformers by its own forward pass."""

    padded = True

    def collate(self, pieces: Sequence[Piece]) -> PaddedBatch:
        return pad(pieces, self.layout)

    def forward(self, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
        """(N,) float32 log pi(token) and (N,) float32 entropy in nats."""
        hidden = self.model.model(**batch.inputs, use_cache=False).last_hidden_state
        return self.head(hidden.flatten(0, 1).index_select(0, batch.predictors), batch.targets, self.vocabulary)


class PackedPolicy(Policy):
    """A model of the Qwen-VL families on packed rows: the vision tower runs once per image, the vocabulary head only
    where a sampled token is predicted."""

    attention: ClassVar[Any] = {"text_config": text_attention.NAME, "vision_config": "sdpa"}
    padded = False

    def __init__(self, spec: PolicySpec, temperature: float, config: LearnerConfig, *rest: Any) -> None:
        super().__init__(spec, temperature, config, *rest)
        # Not by the loader: it takes a name with "flash" in it, which the tower's form of call needs, for a package.
        self.model.config.vision_config._attn_implementation_internal = vision_attention.NAME
        model.multiply_patches(self.model)
        self.merge: int = self.model.config.vision_config.spatial_merge_size
        self._row_multiple = row_multiple(config.micro_tokens)
        if config.compile:
            model.compile_layers(self.model, 4 * ROW_BUCKETS)

    def collate(self, pieces: Sequence[Piece]) -> PackedBatch:
        return pack(pieces, self.layout, self._row_multiple if self.model.device.type == "cuda" else 1)

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """(N,) float32 log pi(token) and (N,) float32 entropy in nats."""
        embeddings = self.model.get_input_embeddings()(batch.input_ids)[0]
        extra: dict[str, Any] = {}
        levels = self._image_levels(batch.pictures)
        if levels is not None:
            levels = levels.index_select(1, batch.image_source).to(embeddings.dtype)
            embeddings = embeddings.index_copy(0, batch.image_slots, levels[0])
            extra = self._deep_features(levels[1:], batch)
        mask = text_attention.packed_mask(batch.spans, len(embeddings), embeddings.device)
        hidden = self.model.model.language_model(
            inputs_embeds=embeddings[None], position_ids=batch.position_ids, use_cache=False, packed=mask, **extra
        ).last_hidden_state
        return self.head(hidden[0].index_select(0, batch.predictors), batch.targets, self.vocabulary)

    def _deep_features(self, levels: Tensor, batch: PackedBatch) -> dict[str, Any]:
        """What Qwen3-VL adds to the first layers' hidden states at the image tokens (DeepStack, arXiv 2406.04334)."""
        if not len(levels):
            return {}
        places = torch.zeros(batch.input_ids.shape, dtype=torch.bool, device=levels.device)
        places[0, batch.image_slots] = True
        in_row_order = batch.image_slots.argsort()
        return {"visual_pos_masks": places, "deepstack_visual_embeds": list(levels[:, in_row_order])}

    def _image_levels(self, pictures: Sequence[Picture]) -> Tensor | None:
        """(levels, image tokens, hidden size) of the images end to end; None where no rank needs any."""
        if self.vision_trained:
            return self._see(pictures)
        known = {p.key: p if p.features is not None else self.features.get(p.key) for p in pictures}
        new = [picture for picture in pictures if known[picture.key] is None]
        self.images += len(pictures)
        self.images_known += len(pictures) - len(new)
        if self._any_rank(bool(new)):
            with torch.no_grad():
                computed = self._see(new)
            sizes = [len(picture.tokens) for picture in new]
            for picture, levels in zip(new, computed.split(sizes, dim=1) if new else (), strict=True):
                self._keep(replace(picture, inputs={}, features=levels.cpu()))
                known[picture.key] = replace(picture, features=levels)
        found = [p.features.to(self.model.device) for p in known.values() if p is not None and p.features is not None]
        return torch.cat(found, dim=1) if found else None

    def _see(self, pictures: Sequence[Picture]) -> Tensor:
        """The vision tower over these images; over one that nobody reads where there is none: under ZeRO-3 every rank
        must run it, text-only rows or not."""
        device = self.model.device
        if pictures:
            values = torch.cat([picture.inputs["pixel_values"] for picture in pictures]).to(device)
            grid = torch.stack([picture.grid for picture in pictures if picture.grid is not None]).to(device)
        else:
            vision = self.model.config.vision_config
            width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
            values = torch.zeros(self.merge**2, width, device=device)
            grid = torch.tensor([[1, self.merge, self.merge]], device=device)
        seen = self.model.model.get_image_features(values, grid)
        deeper = getattr(seen, "deepstack_features", None) or ()
        return torch.stack([torch.cat(level) for level in (seen.pooler_output, *deeper)])

    def _keep(self, picture: Picture) -> None:
        assert picture.features is not None
        if picture.features.nbytes <= self.features.maxsize:
            self.features[picture.key] = picture

    def _any_rank(self, mine: bool) -> bool:
        """Under ZeRO-3 all ranks run the vision tower or none does."""
        if not hasattr(next(self.model.parameters()), "ds_id"):
            return mine
        flag = torch.tensor(float(mine), device=self.model.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


def row_multiple(micro_tokens: int) -> int:
    """What the length of a row on CUDA is a multiple of; 128 is FlexAttention's block."""
    return max(128, -(-micro_tokens // ROW_BUCKETS // 128) * 128)


def load_policy(
    spec: PolicySpec, temperature: float, config: LearnerConfig, fetch: Fetch, entropy_gradient: bool = False
) -> Policy:
    """The policy at `spec.path`, on packed rows where its family allows.

    Raises ValueError where an option asks for what the family does not have.
    """
    family = AutoConfig.from_pretrained(spec.path, local_files_only=True)
    text = family.get_text_config()
    packs = family.model_type in PACKED_FAMILIES and not getattr(text, "use_sliding_window", False)
    if packs and config.rows == "packed":
        return PackedPolicy(spec, temperature, config, fetch, entropy_gradient)
    if config.rows == "packed":
        log.warning(
            "learner: rows are padded, not packed: %s (%s) is not one of %s with full attention. Each image and prompt "
            "is computed once per trajectory.",
            family.model_type,
            spec.path,
            ", ".join(PACKED_FAMILIES),
        )
    return PaddedPolicy(spec, temperature, config, fetch, entropy_gradient)


def _picture_maker(spec: PolicySpec, fetch: Fetch, known: LRUCache[str, Picture]) -> Callable[[ImageHandle], Picture]:
    processor = AutoProcessor.from_pretrained(spec.path, local_files_only=True)
    # The torchvision backend is the engine's: resized pixels then agree to the last bit.
    images = AutoImageProcessor.from_pretrained(spec.path, backend="torchvision", local_files_only=True)

    def make(handle: ImageHandle) -> Picture:
        if (found := known.get(handle.key)) is not None:
            return found
        inputs = images(images=[torch.tensor(decode(fetch(handle))).permute(2, 0, 1)], return_tensors="pt")
        grid = inputs["image_grid_thw"][0] if "image_grid_thw" in inputs else None
        if grid is not None:
            tokens = torch.full((int(grid.prod()) // images.merge_size**2,), spec.image_token_id)
        else:
            replacement = processor.replace_image_token(inputs, 0)
            tokens = torch.tensor(processor.tokenizer(replacement, add_special_tokens=False).input_ids)
        return Picture(key=handle.key, tokens=tokens, inputs=dict(inputs), grid=grid)

    return make


def _feature_bytes(picture: Picture) -> int:
    assert picture.features is not None
    return picture.features.nbytes
