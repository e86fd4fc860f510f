"""Attention of the text model over packed rows, registered through transformers' AttentionInterface.

A tail attends to its piece's prompt and to itself. No model is changed for it. CUDA takes FlexAttention with a block
mask; the CPU takes SDPA once for each piece's prompt and once for all its tails together, so that no score between two
tails is ever computed.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from learner.packing import PieceLengths, part_sizes, token_parts
from learner.transfer import to_device

NAME = "relook_packed"
BLOCK = 128
"""Tokens of a side of FlexAttention's blocks; rows on CUDA are a multiple of it."""
COMPILE: dict[str, Any] = {"fullgraph": True, "recompile_limit": 128}
"""How the kernel, or whole layers, are compiled: at most 3 times (no gradient, one, one of weights only) for each of
the row's lengths, of which `row_multiple` makes 40 up to 8 times `micro_tokens`. Beyond Dynamo's own limit, 8,
FlexAttention would silently compute a row's whole score matrix; beyond this one the call fails."""
Packed = BlockMask | tuple[PieceLengths, ...]
"""The attention mask of a packed row, in the form that the device's kernel takes."""


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, *, packed: Packed, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """query (1, heads, T, dim), key and value (1, key heads, T, dim) -> ((1, T, heads, dim), None).

    `packed` comes from `packed_mask` through the language model's keyword arguments.
    """
    if isinstance(packed, BlockMask):
        kernel = flex_attention if torch.compiler.is_compiling() else _fused()  # part of a compiled layer
        out = kernel(query, key, value, block_mask=packed, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    sizes = [lengths.total for lengths in packed]
    padded = query.shape[2] - sum(sizes)
    # Split, not sliced: the gradient of a slice is a whole row of zeros.
    parts = zip(*(x.split([*sizes, padded], dim=2) for x in (query, key, value)), strict=True)
    outputs = [_piece(q, k, v, lengths, scaling) for lengths, (q, k, v) in zip(packed, parts, strict=False)]
    padding = query.new_zeros(query.shape[1], padded, query.shape[3])
    return torch.cat([*outputs, padding], dim=1).transpose(0, 1)[None], None


def packed_mask(lengths: Sequence[PieceLengths], row: int, device: torch.device) -> Packed:
    """The mask of a row of `row` tokens on this device."""
    if device.type == "cpu":
        return tuple(lengths)
    return block_mask(lengths, row, device)


def block_mask(lengths: Sequence[PieceLengths], row: int, device: torch.device) -> BlockMask:
    """FlexAttention's mask, from the spans of the row's parts: no T x T table is made.

    With o (parts, blocks) tokens of a part in a block and p the same of the prompt that the part goes on from, the
    pairs that attend are p for every token of o, o for every token of an earlier block's o, and a triangle in o's own.
    """
    part, prompt = to_device(token_parts(lengths, row), device)

    def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & ((part[k] == part[q]) | (part[k] == prompt[q]))

    sizes, prompts = part_sizes(lengths, row)
    ends = sizes.cumsum()[:, None]
    edges = np.arange(-(-row // BLOCK) + 1) * BLOCK
    own = np.diff(edges.clip(ends - sizes[:, None], ends)).astype(np.float32)
    shared = own[prompts] * (prompts != np.arange(len(prompts)))[:, None]
    pairs = own.T @ shared + np.tril(own.T @ own, -1) + np.diag((own * (own + 1) / 2).sum(0))
    full = pairs == BLOCK**2
    blocks = *_blocks((pairs > 0) & ~full, device), *_blocks(full, device)
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(row, row))


def _blocks(wanted: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """(blocks, blocks) bool -> (1, 1, blocks) their number in each row, (1, 1, blocks, blocks) theirs first."""
    order = np.argsort(~wanted, axis=1, kind="stable")
    made = (torch.from_numpy(x.astype(np.int32))[None, None] for x in (wanted.sum(1), order))
    number, indices = (to_device(x, device) for x in made)
    return number, indices


@cache
def _fused() -> Any:
    """FlexAttention as one kernel. Made when first called: Inductor is seconds of import that only CUDA needs."""
    return torch.compile(flex_attention, dynamic=False, **COMPILE)


def _piece(query: Tensor, key: Tensor, value: Tensor, lengths: PieceLengths, scaling: float) -> Tensor:
    """(1, heads, length, dim), key and value (1, key heads, length, dim) -> (heads, length, dim)."""
    p = lengths.prompt
    own = [x.split([p, sum(lengths.tails)], dim=2) for x in (query, key, value)]
    (q, _), (k, _), (v, _) = own
    prompt = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)[0]
    present = tuple(length for length in lengths.tails if length)
    if not present:
        return prompt
    width = max(present)
    q, tail_k, tail_v = (_stack(tails, present, width) for _, tails in own)
    k, v = (torch.cat([one.expand(len(present), -1, -1, -1), tail], dim=2) for one, tail in ((k, tail_k), (v, tail_v)))
    out = scaled_dot_product_attention(q, k, v, attn_mask=_tail_mask(p, width), scale=scaling, enable_gqa=True)
    return torch.cat([prompt, *(tail[:, :length] for tail, length in zip(out, present, strict=True))], dim=1)


def _stack(tails: Tensor, lengths: tuple[int, ...], width: int) -> Tensor:
    """(1, heads, sum of lengths, dim) -> (tails, heads, width, dim), padded behind what a real token attends to."""
    return torch.stack([pad(tail, (0, 0, 0, width - tail.shape[1])) for tail in tails[0].split(lengths, dim=1)])


@lru_cache(maxsize=64)  # every layer asks, forward and recomputed
def _tail_mask(prompt: int, width: int) -> Tensor:
    """(width, prompt + width) bool: what a tail's r-th token attends to in [prompt | tail]."""
    return torch.ones(width, prompt + width, dtype=torch.bool).tril(prompt)


AttentionInterface.register(NAME, attend)
