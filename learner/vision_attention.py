"""Window attention of vision towers: all windows of one length in one call.

transformers' `sdpa` path loops over windows in Python. This one is registered under a name that contains "flash", so
that the tower passes the windows' boundaries (`cu_seq_lens`) instead; CUDA gets torch's own varlen kernel, the CPU
batched SDPA.
"""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "relook_flash_windows"


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query, key, value: (1, heads, tokens, head_dim); windows are the spans of `cu_seq_lens_q` (windows + 1,).

    Returns ((1, tokens, heads, head_dim), None). Every token attends to its own window only.
    """
    if query.is_cuda and query.dtype != torch.float32:  # the kernel has no float32
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        out = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling)
        assert isinstance(out, torch.Tensor)  # a tuple only where auxiliary results are asked for
        return out.unsqueeze(0), None
    lengths = cu_seq_lens_q.diff()
    if bool((lengths == lengths[0]).all()):
        return _equal_windows(query, key, value, len(lengths), scaling).unsqueeze(0), None
    output = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
    for length in lengths.unique().tolist():
        starts = cu_seq_lens_q[:-1][lengths == length]
        rows = (starts[:, None] + torch.arange(length, device=starts.device)).flatten()
        q, k, v = (x[:, :, rows] for x in (query, key, value))
        output = output.index_copy(0, rows, _equal_windows(q, k, v, len(starts), scaling))
    return output.unsqueeze(0), None


def _equal_windows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, windows: int, scaling: float
) -> torch.Tensor:
    """(1, heads, windows * length, dim) -> (windows * length, heads, dim)."""
    _, heads, tokens, dim = query.shape
    q, k, v = (x[0].reshape(heads, windows, tokens // windows, dim).transpose(0, 1) for x in (query, key, value))
    out = scaled_dot_product_attention(q, k, v, scale=scaling)
    return out.transpose(1, 2).reshape(tokens, heads, dim)


AttentionInterface.register(NAME, attend)
