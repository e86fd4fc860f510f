"""Window attention of vision towers: all windows of one length in one call.

transformers' `sdpa` path loops over windows in Python. This one is registered under a name that contains "flash", so
that the tower passes the windows' boundaries (`cu_seq_lens`) instead; CUDA gets torch's own varlen kernel, the CPU
batched SDPA.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, vision_utils

NAME = "relook_flash_windows"


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """query, key, value: (1, heads, tokens, head_dim); windows are the spans of `cu_seq_lens_q` (windows + 1,).

    Returns ((1, tokens, heads, head_dim), None). Every token attends to its own window only.
    """
    if not query.is_cpu and query.dtype != torch.float32:  # the kernel has no float32
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        out = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling)
        assert isinstance(out, Tensor)  # a tuple only where auxiliary results are asked for
        return out.unsqueeze(0), None
    bounds, lengths = cu_seq_lens_q.tolist(), cu_seq_lens_q.diff().tolist()
    if len(set(lengths)) == 1:
        return _equal_windows(query, key, value, len(lengths), scaling).unsqueeze(0), None
    output = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
    for length in sorted(set(lengths)):
        starts = torch.tensor([start for start, own in zip(bounds, lengths, strict=False) if own == length])
        rows = (starts[:, None] + torch.arange(length)).flatten().to(query.device)
        q, k, v = (x[:, :, rows] for x in (query, key, value))
        output = output.index_copy(0, rows, _equal_windows(q, k, v, len(starts), scaling))
    return output.unsqueeze(0), None


def _equal_windows(query: Tensor, key: Tensor, value: Tensor, windows: int, scaling: float) -> Tensor:
    """(1, heads, windows * length, dim) -> (windows * length, heads, dim)."""
    _, heads, tokens, dim = query.shape
    q, k, v = (x[0].reshape(heads, windows, tokens // windows, dim).transpose(0, 1) for x in (query, key, value))
    out = scaled_dot_product_attention(q, k, v, scale=scaling)
    return out.transpose(1, 2).reshape(tokens, heads, dim)


class GridArguments:
    """Arguments of a Qwen-VL tower that follow from its images' grids, made on the host, once for each grid and by
    transformers' own functions. The tower would make them of grids on the device, and read those back each time."""

    def __init__(self, tower: Any) -> None:
        self._tower, self._of_one = tower, lru_cache(maxsize=256)(self._one_image)

    def __call__(self, grids: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Grids (temporal, height, width in patches) of images that come end to end -> keyword arguments."""
        tensors, windows = zip(*(self._of_one(*grid) for grid in grids), strict=True)
        made: dict[str, Any] = {name: torch.cat([one[name] for one in tensors]) for name in tensors[0]}
        if "window_index" in made:
            indices = [one["window_index"] for one in tensors]
            starts = accumulate(map(len, indices), initial=0)
            made["window_index"] = torch.cat([index + start for index, start in zip(indices, starts, strict=False)])
        for name in windows[0]:
            lengths = [length for one in windows for length in one[name]]
            made[f"cu_{name}s"] = torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32)
            made[f"max_{name}"] = max(lengths)
        return made

    def _one_image(self, *grid: int) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
        """Tensors by argument; lengths in patches of what attends to itself, by `seqlen` or `window_seqlen`."""
        tower, one, merge = self._tower, torch.tensor([grid]), self._tower.spatial_merge_size
        tensors = {"position_ids": vision_utils.get_vision_position_ids(one, merge)}
        windows = {"seqlen": vision_utils.get_vision_cu_seqlens(one).diff().tolist()}
        if hasattr(tower, "window_size"):
            window, patch = tower.window_size, tower.patch_size
            tensors["window_index"], bounds = vision_utils.get_vision_window_index(one, merge, window, patch)
            windows["window_seqlen"] = bounds.diff().tolist()
        if hasattr(tower, "num_grid_per_side"):
            tensors["interp_indices"], tensors["interp_weights"] = (
                vision_utils.get_vision_interpolation_indices_and_weights(
                    one, tower.num_grid_per_side, tower.interpolation_mode, tower.interpolation_align_corners, merge
                )
            )
        return tensors, windows


AttentionInterface.register(NAME, attend)
