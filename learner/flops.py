"""How much arithmetic a step cannot avoid, and how fast the device multiplies: their quotient is the MFU.

    useful FLOPs of a micro-batch = sum over its groups of
        2 * text parameters * tokens              linear layers; a group's prompt once, its trajectories once each
      + 4 * heads * head dim * layers * pairs     scores and values of every (query, key) that may see each other
      + 2 * hidden size * vocabulary * sampled    head, only where a sampled token is predicted
      + 2 * vision parameters * patches           once per image
      + 4 * vision width * sum over blocks of its windows' squared lengths
    times 3 for what is trained (forward, and twice as much backward), 2 where only activations' gradients pass (frozen
    weights under adapters), 1 for a frozen vision tower, 0 for features that are known already.

Whatever is computed beyond that (prompts again in every row, padding, recomputed layers) makes the MFU smaller.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from learner.model import vision_tower
from learner.rows import Picture, Piece
from learner.zero import full_shape

_SQUARE = {"cuda": 8192, "cpu": 768}


class FlopCounter:
    """Counts for a model of the Qwen-VL families, as a step with gradient needs them."""

    def __init__(self, model: Any, vision_trained: bool, adapters: bool) -> None:
        text = model.config.get_text_config()
        self._text_passes, self._vision_passes = 2 if adapters else 3, 3 if vision_trained else 1
        self._text = _matrices(model.model.language_model.layers)
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self._pair = 4 * text.num_attention_heads * dim * text.num_hidden_layers
        self._sampled = 2 * text.hidden_size * text.vocab_size
        tower: Any = vision_tower(model)
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
        images = {p.key: p for piece in pieces for p in _pictures(piece) if p.features is None}
        vision = sum(self._image(picture) for picture in images.values())
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


class MatrixRate:
    """FLOP/s of a plain square matrix product on this device: the best seen so far, since other load only lowers it."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        n = self._side = _SQUARE[device.type]
        self._device = device
        self._factors = [torch.randn(n, n, device=device).to(dtype) for _ in range(2)]
        self._best = 0.0
        for _ in range(4):
            self.measure()

    def measure(self) -> float:
        """One more product (milliseconds); returns the best rate."""
        self._synchronize()
        began = time.perf_counter()
        torch.mm(*self._factors)
        self._synchronize()
        self._best = max(self._best, 2.0 * self._side**3 / (time.perf_counter() - began))
        return self._best

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _pictures(piece: Piece) -> list[Picture]:
    return [*piece.prompt.pictures, *(picture for tail in piece.tails for _, picture in tail.pictures)]


def _tiles(length: int, side: int) -> int:
    """Sum of squared lengths of the windows that tile one axis."""
    full, rest = divmod(length, side)
    return full * side**2 + rest**2


def _matrices(module: Any) -> int:
    """Parameters of linear maps."""
    return sum(torch.Size(full_shape(p)).numel() for p in module.parameters() if len(full_shape(p)) > 1)
