"""The Qwen-VL families: M-RoPE positions, images as patches in native resolution, DeepStack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from learner import gated_delta_net, text_attention, vision_attention
from learner.families import Family, register
from learner.families.packed import Packed, PackedPolicy
from learner.rows import Picture, Piece
from learner.transfer import to_device
from learner.zero import full_shape
from perception.config import LearnerConfig


class QwenPolicy(PackedPolicy):
    """A model of the Qwen-VL families on packed rows."""

    axes = 3

    def __init__(self, family: Family, temperature: float, config: LearnerConfig, entropy_gradient: bool) -> None:
        super().__init__(family, temperature, config, entropy_gradient)
        # Not by the loader: it takes a name with "flash" in it, which the tower's form of call needs, for a package.
        self.model.config.vision_config._attn_implementation_internal = vision_attention.NAME
        multiply_patches(self.model)
        self.model.model.language_model._deepstack_process = _add_deep_features  # of Qwen3-VL
        self._grid_arguments = vision_attention.GridArguments(self.model.model.visual)
        for block in self.model.model.visual.blocks if config.compile else ():  # for any number of patches
            block.compile(**text_attention.COMPILE)

    def positions(self, ids: Tensor, grids: Tensor) -> Tensor:
        """M-RoPE: time, height, width."""
        is_image = (ids == self.model.config.image_token_id).to(torch.int32)
        positions, _ = self.model.model.get_rope_index(ids[None], is_image[None], image_grid_thw=grids)
        return positions[:, 0]

    def vision_features(self, pictures: Sequence[Picture]) -> Tensor:
        tower = self.model.model.visual
        values = to_device(torch.cat([picture.inputs["pixel_values"] for picture in pictures]), self.model.device)
        grids = [picture.grid.tolist() for picture in pictures if picture.grid is not None]
        known = to_device(self._grid_arguments(grids), self.model.device)
        features = tower(values.to(tower.dtype), grid_thw=None, **known)
        return torch.stack([features.pooler_output, *(getattr(features, "deepstack_features", None) or ())])


@register("qwen2_vl")
@register("qwen2_5_vl")
@register("qwen3_vl")
@register("qwen3_5")
class QwenVL(Packed):
    packed: ClassVar[type[PackedPolicy]] = QwenPolicy

    def prepare(self, key: str, pixels: Tensor) -> Picture:
        images = self.processor.image_processor
        inputs = images(images=[pixels], return_tensors="pt")
        grid = inputs["image_grid_thw"][0]
        tokens = torch.full((int(grid.prod()) // images.merge_size**2,), self.spec.image_token_id)
        pixels = inputs["pixel_values"].to(getattr(torch, self.spec.dtype))
        return Picture(key=key, tokens=tokens, inputs={**inputs, "pixel_values": pixels}, grid=grid)

    def flops(self, model: Any, vision_trained: bool, adapters: bool) -> FlopCounter:
        return FlopCounter(model, vision_trained, adapters)


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
