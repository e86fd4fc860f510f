"""The Qwen-VL families on packed rows: M-RoPE positions, images as patches in native resolution, DeepStack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from cachetools import LRUCache
from torch import Tensor, nn
from torch.nn.functional import linear

from learner import gated_delta_net, text_attention, vision_attention
from learner.families import Family, register
from learner.packing import PackedBatch, pack
from learner.policy import Policy
from learner.rows import Picture, Piece
from learner.text_attention import BLOCK
from learner.transfer import to_device
from learner.zero import full_shape
from perception.config import LearnerConfig
from perception.types import ImageHandle

ROW_BUCKETS = 16
"""Lengths of rows within `micro_tokens` that are compiled for on CUDA, at most.

Padding as a share of the tokens, simulated over 400 steps of 16 groups (923 + 8 x 150 tokens) in rows of 8,192, of 8
groups (prompts of 120 to 1,100 tokens) in rows of 16,384 and of 2 groups in rows of 8,192: 3, 4 and 6 % here; 6, 7 and
12 % with 8 lengths; 12, 10 and 30 % with 4; 1 % with dynamic shapes, whose kernel must test every block's border."""


@register("qwen2_vl")
@register("qwen2_5_vl")
@register("qwen3_vl")
@register("qwen3_5")
class QwenVL(Family):
    def policy(self, rows: Literal["packed", "padded"]) -> type[Policy]:
        text = self.config.get_text_config()
        others = [kind for kind in getattr(text, "layer_types", ()) if kind != "full_attention"]
        packs = len(others) == gated_delta_net.layers(text)  # windows and other recurrences do not
        return PackedPolicy if rows == "packed" and packs else super().policy(rows)

    def prepare(self, key: str, pixels: Tensor) -> Picture:
        images = self.processor.image_processor
        inputs = images(images=[pixels], return_tensors="pt")
        grid = inputs["image_grid_thw"][0]
        tokens = torch.full((int(grid.prod()) // images.merge_size**2,), self.spec.image_token_id)
        pixels = inputs["pixel_values"].to(getattr(torch, self.spec.dtype))
        return Picture(key=key, tokens=tokens, inputs={**inputs, "pixel_values": pixels}, grid=grid)

    def flops(self, model: Any, vision_trained: bool, adapters: bool) -> FlopCounter:
        return FlopCounter(model, vision_trained, adapters)


class PackedPolicy(Policy):
    """A model of the Qwen-VL families on packed rows: the vision tower runs once per image, the vocabulary head only
    where a sampled token is predicted."""

    attention: ClassVar[Any] = {"text_config": text_attention.NAME, "vision_config": "sdpa"}
    padded = False

    def __init__(self, family: Family, temperature: float, config: LearnerConfig, entropy_gradient: bool) -> None:
        super().__init__(family, temperature, config, entropy_gradient)
        self.layout = replace(self.layout, picture=self.picture, positions=self.positions)
        self.features: LRUCache[str, Picture] = LRUCache(config.feature_cache_mb << 20, _feature_bytes)
        """Images whose features are known, where the vision tower is frozen."""
        # Not by the loader: it takes a name with "flash" in it, which the tower's form of call needs, for a package.
        self.model.config.vision_config._attn_implementation_internal = vision_attention.NAME
        multiply_patches(self.model)
        self.model.model.language_model._deepstack_process = _add_deep_features  # of Qwen3-VL
        self._reach = gated_delta_net.pack_layers(self.model)
        self._grid_arguments = vision_attention.GridArguments(self.model.model.visual)
        self._micro_tokens = config.micro_tokens
        if config.compile:
            for layer in self.model.model.language_model.layers:
                # The blocks of a gated delta net have other sizes in every row.
                (layer.mlp if hasattr(layer, "linear_attn") else layer).compile(dynamic=False, **text_attention.COMPILE)
            for block in self.model.model.visual.blocks:  # for any number of patches
                block.compile(**text_attention.COMPILE)

    def picture(self, handle: ImageHandle) -> Picture:
        return self.features.get(handle.key) or self.family.picture(handle)

    def positions(self, ids: Tensor, grids: Tensor) -> Tensor:
        """M-RoPE positions (3, T) of expanded ids (T,) holding the images of `grids` (images, 3)."""
        is_image = (ids == self.model.config.image_token_id).to(torch.int32)
        positions, _ = self.model.model.get_rope_index(ids[None], is_image[None], image_grid_thw=grids)
        return positions[:, 0]

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
        hidden = self.model.model.language_model(
            inputs_embeds=embeddings[None], position_ids=batch.position_ids, use_cache=False, packed=mask, **extra
        ).last_hidden_state
        return self.head(hidden[0].index_select(0, batch.predictors), batch.targets, self.vocabulary)

    def _image_levels(self, pictures: Sequence[Picture]) -> Tensor | None:
        """(levels, image tokens, hidden size) of the images end to end; None where no rank needs any."""
        if self.vision_trained:
            return self._vision_features(pictures)
        levels = {p.key: self.features.get(p.key, p).features if p.features is None else p.features for p in pictures}
        new = [picture for picture in pictures if levels[picture.key] is None]
        self.images += len(pictures)
        self.images_known += len(pictures) - len(new)
        if self._any_rank(bool(new)):
            with torch.no_grad():
                computed = self._vision_features(new)
            sizes = [len(picture.tokens) for picture in new]
            for picture, own in zip(new, computed.split(sizes, dim=1) if new else (), strict=True):
                levels[picture.key] = own
                if own.nbytes <= self.features.maxsize:
                    self.features[picture.key] = replace(picture, inputs={}, features=own.cpu())
        found = [to_device(own, self.model.device) for own in levels.values() if own is not None]
        return torch.cat(found, dim=1) if found else None

    def _vision_features(self, pictures: Sequence[Picture]) -> Tensor:
        """The vision tower's features of these images as (levels, k, hidden size); no image: of a blank one."""
        pictures, tower = pictures or [self.blank], self.model.model.visual
        values = to_device(torch.cat([picture.inputs["pixel_values"] for picture in pictures]), self.model.device)
        grids = [picture.grid.tolist() for picture in pictures if picture.grid is not None]
        known = to_device(self._grid_arguments(grids), self.model.device)
        features = tower(values.to(tower.dtype), grid_thw=None, **known)
        return torch.stack([features.pooler_output, *(getattr(features, "deepstack_features", None) or ())])

    def _any_rank(self, needed: bool) -> bool:
        """Whether the vision tower must run: under ZeRO-3 on all ranks or on none."""
        if not hasattr(next(self.model.parameters()), "ds_id"):
            return needed
        flag = torch.tensor(float(needed), device=self.model.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


def row_multiple(tokens: int, micro_tokens: int) -> int:
    """What a row of so many tokens is padded to a multiple of on CUDA, itself one of FlexAttention's block.

    That makes `ROW_BUCKETS` lengths up to `micro_tokens`, which only a trajectory that alone is longer exceeds, and
    half as many for every doubling beyond.
    """
    multiple = max(1, math.ceil(micro_tokens / ROW_BUCKETS / BLOCK)) * BLOCK
    while multiple * ROW_BUCKETS < tokens:
        multiple *= 2
    return multiple


class _PatchProduct(nn.Conv3d):
    """A convolution of patches by kernels of a patch's size, as the matrix product that it is: several times faster."""

    def forward(self, patches: Tensor) -> Tensor:
        """(patches, channels, time, height, width) -> (patches, width of the tower)."""
        return linear(patches.flatten(1), self.weight.flatten(1), self.bias)


def multiply_patches(model: Any) -> None:
    """The processor has cut images into patches."""
    model.model.visual.patch_embed.proj.__class__ = _PatchProduct


def _add_deep_features(hidden: Tensor, places: Tensor, features: Tensor) -> Tensor:
    """(1, T, hidden size) with (K, hidden size) added at `places` (K,) (DeepStack, arXiv 2406.04334).

    In transformers' own addition the places are a mask, whose number of true entries the host would wait for.
    """
    return hidden.index_add(1, places, features[None])


class FlopCounter:
    """Useful FLOPs: the arithmetic that a step cannot avoid.

    useful FLOPs of a micro-batch = sum over its groups of
        2 * text parameters * tokens              linear layers; a group's prompt once, its trajectories once each
      + 4 * heads * head dim * layers * pairs     scores and values of every (query, key) that attends
      + 6 * value heads * key dim * value dim * linear layers * tokens    a state is read, written, read
      + 2 * hidden size * vocabulary * sampled    head, only where a sampled token is predicted
      + 2 * vision parameters * patches           once per image
      + 4 * vision width * sum over blocks of its windows' squared lengths
    times 3 for what is trained (forward, and twice as much backward), 2 where only activations' gradients pass (frozen
    weights under adapters), 1 for a frozen vision tower, 0 for features that are known already.

    Whatever is computed beyond that (prompts again in every row, padding, recomputed layers) makes the MFU smaller.
    """

    def __init__(self, model: Any, vision_trained: bool, adapters: bool) -> None:
        text, tower = model.config.get_text_config(), model.model.visual
        self._text_passes, self._vision_passes = 2 if adapters else 3, 3 if vision_trained else 1
        self._text = _matrices(model.model.language_model.layers) + gated_delta_net.products(text)
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self._pair = 4 * text.num_attention_heads * dim * (text.num_hidden_layers - gated_delta_net.layers(text))
        self._sampled = 2 * text.hidden_size * text.vocab_size
        self._vision = model.config.vision_config
        self._width = getattr(self._vision, "embed_dim", None) or self._vision.hidden_size
        self._patch = 2 * (_matrices(tower.patch_embed) + _matrices(tower.blocks))
        mergers = [tower.merger, *getattr(tower, "deepstack_merger_list", ())]
        self._merged = 2 * sum(_matrices(merger) for merger in mergers)

    def __call__(self, pieces: Sequence[Piece]) -> float:
        """Useful FLOPs of one micro-batch, forward and backward."""
        tokens = pairs = sampled = 0
        for piece in pieces:
            prompt = len(piece.prompt.ids)
            tokens += piece.packed
            pairs += prompt * (prompt + 1) // 2
            pairs += sum(tail.length * prompt + tail.length * (tail.length + 1) // 2 for tail in piece.tails)
            sampled += sum(len(tail.targets) for tail in piece.tails)
        text = 2.0 * self._text * tokens + self._pair * pairs + self._sampled * sampled
        pictures = [picture for piece in pieces for picture in piece.pictures]
        new = {picture.key: picture for picture in pictures if picture.features is None}
        vision = sum(map(self._image, new.values()))
        return self._text_passes * text + self._vision_passes * vision

    def _image(self, picture: Picture) -> float:
        assert picture.grid is not None
        frames, height, width = picture.grid.tolist()
        whole = getattr(self._vision, "fullatt_block_indexes", range(self._vision.depth))
        squares = len(whole) * frames * (height * width) ** 2
        if len(whole) < self._vision.depth:
            side = self._vision.window_size // self._vision.patch_size
            squares += (self._vision.depth - len(whole)) * frames * _tiles(height, side) * _tiles(width, side)
        linear = self._patch * frames * height * width + self._merged * len(picture.tokens)
        return float(linear + 4 * self._width * squares)


def _tiles(length: int, side: int) -> int:
    """Sum of squared lengths of the windows that tile one axis."""
    full, rest = divmod(length, side)
    return full * side**2 + rest**2


def _matrices(module: Any) -> int:
    """Parameters of linear maps."""
    return sum(torch.Size(full_shape(p)).numel() for p in module.parameters() if len(full_shape(p)) > 1)


def _feature_bytes(picture: Picture) -> int:
    assert picture.features is not None
    return picture.features.nbytes
