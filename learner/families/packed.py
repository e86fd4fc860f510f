"""Packed rows of any family whose language model attends to all that came before, images' features in their place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from cachetools import LRUCache
from torch import Tensor

from learner import gated_delta_net, text_attention
from learner.families import Family, register
from learner.families.generic import end_to_end
from learner.packing import PackedBatch, pack
from learner.policy import Policy
from learner.rows import Picture, Piece
from learner.text_attention import BLOCK
from learner.transfer import to_device
from perception.config import LearnerConfig
from perception.types import ImageHandle

ROW_BUCKETS = 16
"""Lengths of rows within `micro_tokens` that are compiled for on CUDA, at most.

Padding as a share of the tokens, simulated over 400 steps of 16 groups (923 + 8 x 150 tokens) in rows of 8,192, of 8
groups (prompts of 120 to 1,100 tokens) in rows of 16,384 and of 2 groups in rows of 8,192: 3, 4 and 6 % here; 6, 7 and
12 % with 8 lengths; 12, 10 and 30 % with 4; 1 % with dynamic shapes, whose kernel must test every block's border."""


class PackedPolicy(Policy):
    """The vision tower runs once per image, the vocabulary head only where a sampled token is predicted."""

    attention: ClassVar[Any] = {"text_config": text_attention.NAME, "vision_config": "sdpa"}
    padded = False
    axes: ClassVar[int] = 1
    """Numbers that a token's position has."""

    def __init__(self, family: Family, temperature: float, config: LearnerConfig, entropy_gradient: bool) -> None:
        super().__init__(family, temperature, config, entropy_gradient)
        self.layout = replace(self.layout, picture=self.picture, positions=self.positions)
        self.features: LRUCache[str, Picture] = LRUCache(config.feature_cache_mb << 20, _feature_bytes)
        """Images whose features are known, where the vision tower is frozen."""
        self._micro_tokens = config.micro_tokens
        self._reach = gated_delta_net.pack_layers(self.model)
        for layer in self.model.get_decoder().layers if config.compile else ():
            # The blocks of a gated delta net have other sizes in every row.
            (layer.mlp if hasattr(layer, "linear_attn") else layer).compile(dynamic=False, **text_attention.COMPILE)

    def picture(self, handle: ImageHandle) -> Picture:
        return self.features.get(handle.key) or self.family.picture(handle)

    def positions(self, ids: Tensor, grids: Tensor) -> Tensor:
        """Positions (3, T) of expanded ids (T,) holding the images of `grids` (images, 3)."""
        return torch.arange(len(ids)).expand(3, -1)

    def collate(self, pieces: Sequence[Piece]) -> PackedBatch:
        tokens = sum(piece.packed for piece in pieces)
        multiple = row_multiple(tokens, self._micro_tokens) if self.model.device.type != "cpu" else 1
        return pack(pieces, self.layout, multiple)

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """(N,) float32 log pi(token) and (N,) float32 entropy in nats."""
        embeddings = self.model.get_input_embeddings()(batch.input_ids)[0]
        extra: dict[str, Any] = {}
        levels = self._image_levels(batch.pictures)
        if levels is not None:
            levels = levels.index_select(1, batch.image_source).to(embeddings.dtype)
            embeddings = embeddings.index_copy(0, batch.image_slots, levels[0])
            if len(levels) > 1:
                extra = {"visual_pos_masks": batch.image_slots, "deepstack_visual_embeds": levels[1:]}
        if self._reach:
            own = gated_delta_net.branches(batch.lengths, len(embeddings), self._reach)
            extra["attention_mask"] = {"full_attention": None, gated_delta_net.KIND: to_device(own, embeddings.device)}
        mask = text_attention.packed_mask(batch.lengths, len(embeddings), embeddings.device)
        positions = batch.position_ids[: self.axes].squeeze(0)  # an only axis goes
        hidden = self.model.get_decoder()(
            inputs_embeds=embeddings[None], position_ids=positions, use_cache=False, packed=mask, **extra
        ).last_hidden_state
        return self.head(hidden[0].index_select(0, batch.predictors), batch.targets, self.vocabulary)

    def vision_features(self, pictures: Sequence[Picture]) -> Tensor:
        """(levels, image tokens, hidden size) of these images, end to end. Qwen3-VL alone has more levels than one."""
        parts = {name: end_to_end([picture.inputs[name] for picture in pictures]) for name in pictures[0].inputs}
        made = self.model.model.get_image_features(**to_device(parts, self.model.device)).pooler_output
        return torch.cat([*made])[None]

    def _image_levels(self, pictures: Sequence[Picture]) -> Tensor | None:
        """`vision_features`, as far as they are not known; None where no rank needs any."""
        if self.vision_trained:
            return self.vision_features(pictures or [self.blank])
        levels = {p.key: self.features.get(p.key, p).features if p.features is None else p.features for p in pictures}
        new = [picture for picture in pictures if levels[picture.key] is None]
        self.images += len(pictures)
        self.images_known += len(pictures) - len(new)
        if self._any_rank(bool(new)):
            with torch.no_grad():
                computed = self.vision_features(new or [self.blank])
            sizes = [self.layout.size(picture) for picture in new]
            for picture, own in zip(new, computed.split(sizes, dim=1) if new else (), strict=True):
                levels[picture.key] = own
                if own.nbytes <= self.features.maxsize:
                    self.features[picture.key] = replace(picture, inputs={}, features=own.cpu())
        found = [to_device(own, self.model.device) for own in levels.values() if own is not None]
        return torch.cat(found, dim=1) if found else None

    def _any_rank(self, needed: bool) -> bool:
        """Whether the vision tower must run: under ZeRO-3 on all ranks or on none."""
        if not hasattr(next(self.model.parameters()), "ds_id"):
            return needed
        flag = torch.tensor(float(needed), device=self.model.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


class Packed(Family):
    """A family that packs, but for a model of it with windows, or with a recurrence that is no gated delta net."""

    packed: ClassVar[type[PackedPolicy]] = PackedPolicy

    def policy(self, rows: Literal["packed", "padded"]) -> type[Policy]:
        text = self.config.get_text_config()
        others = [kind for kind in getattr(text, "layer_types", None) or () if kind != "full_attention"]
        packs = len(others) == gated_delta_net.layers(text) and not getattr(text, "sliding_window", None)
        return self.packed if rows == "packed" and packs else super().policy(rows)


for plain in ("idefics3", "internvl", "llava", "llava_next", "llava_onevision", "mistral3", "smolvlm"):
    register(plain)(Packed)


def row_multiple(tokens: int, micro_tokens: int) -> int:
    """What a row of so many tokens is padded to a multiple of on CUDA, itself one of FlexAttention's block.

    That makes `ROW_BUCKETS` lengths up to `micro_tokens`, which only a trajectory that alone is longer exceeds, and
    half as many for every doubling beyond.
    """
    multiple = max(1, math.ceil(micro_tokens / ROW_BUCKETS / BLOCK)) * BLOCK
    while multiple * ROW_BUCKETS < tokens:
        multiple *= 2
    return multiple


def _feature_bytes(picture: Picture) -> int:
    assert picture.features is not None
    return picture.features.nbytes
