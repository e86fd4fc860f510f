"""Attention of the text model over packed rows, registered through transformers' AttentionInterface.

A tail attends to its piece's prompt and to itself. No model is changed for it. CUDA takes FlexAttention with a block
mask; the CPU takes SDPA once for each piece's prompt and once for all its tails together, so that no score between two
tails is ever computed.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from learner.packing import PieceLengths, token_parts

NAME = "relook_packed"
_flex: Any = torch.compile(flex_attention, dynamic=False)
"""Compiled once per length of row; inside a compiled layer it is part of that."""
Packed = BlockMask | tuple[PieceLengths, ...]
"""The attention mask of a packed row, in the form that the device's kernel takes."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    packed: Packed,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """query (1, heads, T, dim), key and value (1, key heads, T, dim) -> ((1, T, heads, dim), None).

    `packed` comes from `packed_mask` through the language model's keyword arguments.
    """
    if isinstance(packed, BlockMask):
        out = _flex(query, key, value, block_mask=packed, scale=scaling, enable_gqa=True)
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
    if device.type != "cuda":
        return tuple(lengths)
    part, prompt = (x.to(device) for x in token_parts(lengths, row))

    def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & ((part[k] == part[q]) | (part[k] == prompt[q]))

    return create_block_mask(visible, None, None, row, row, device=device)


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
    k, v = (
        torch.cat([shared.expand(len(present), -1, -1, -1), tail], dim=2) for shared, tail in ((k, tail_k), (v, tail_v))
    )
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
