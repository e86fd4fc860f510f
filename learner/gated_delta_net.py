"""Gated DeltaNet, the linear attention of Qwen3.5 (arXiv 2412.06464), over packed rows.

Such a layer has no mask: what it knows of earlier tokens is a state, one matrix per head, and the last inputs of a
short convolution. In a row [prompt | tail | tail] they would leak from one tail into the next; here every tail begins
with those of its prompt's end. Places of the row `prompt 7 8 9 | tail 4 5 | tail 3`, with a convolution over 3 tokens:

    prompts   tokens  - - 0 1 2    - is place 6, a row of zeros that changes no state
    tails     tokens  1 2 3 4      origin 0    the two inputs before a part, then the part itself
                      1 2 5 -      origin 0
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus
from torch.nn.utils.rnn import pad_sequence
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5GatedDeltaNet,
    causal_conv1d_fn,
    torch_chunk_gated_delta_rule,  # fla's kernel where that is installed
)

from learner.packing import PieceLengths, part_sizes

KIND = "linear_attention"
"""Such a layer's name in the `layer_types` of transformers' configurations, where other families have other layers."""
CHUNK = 64
"""Tokens that the rule takes at once: no shorter part is cheaper."""
KEPT = 0 if find_spec("fla") else 12
"""Numbers kept for the backward pass, over those of a token's keys and values, by the rule in transformers' own form
(measured, in bfloat16); fla's kernel computes them anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """n parts of a row that are computed at once: their lengths differ by less than twice, or are within a chunk."""

    tokens: Tensor
    """(n, reach + longest part) places of a row of T tokens and, behind it, one of zeros at T (see the example)."""
    origin: Tensor
    """(n,) the prompt that each one goes on from, counted through the blocks of prompts; of a prompt, itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Branches:
    """How the state runs through a row of T tokens."""

    prompts: Mapping[int, Block]
    tails: Mapping[int, Block]
    outputs: Tensor
    """(T,) where each token's output stands among those of all blocks, end to end."""


def branches(lengths: Sequence[PieceLengths], row: int, reach: int) -> Branches:
    """The branches of a row, its padding a prompt like others. `reach`: how far back the convolution sees."""
    sizes, origins = part_sizes(lengths, row)
    places = torch.arange(row).split(sizes.tolist())
    found: tuple[dict[int, dict[int, Tensor]], ...] = ({}, {})
    for part, origin in enumerate(origins.tolist()):
        if sizes[part]:
            before = places[origin][-reach:] if origin != part else places[part][:0]
            tokens = pad(torch.cat([before, places[part]]), (reach - len(before), 0), value=row)
            doublings = (max(int(sizes[part]), CHUNK) - 1).bit_length()
            found[origin != part].setdefault(doublings, {})[part] = tokens
    numbers = {part: number for number, part in enumerate(part for own in found[0].values() for part in own)}
    prompts, tails = (
        {
            doublings: Block(
                tokens=pad_sequence([*own.values()], batch_first=True, padding_value=row),
                origin=torch.tensor([numbers[int(origins[part])] for part in own]),
            )
            for doublings, own in blocks.items()
        }
        for blocks in found
    )
    order = torch.cat([one.tokens[:, reach:].flatten() for one in (*prompts.values(), *tails.values())])
    outputs = torch.zeros(row + 1, dtype=torch.int64).scatter(0, order, torch.arange(len(order)))
    return Branches(prompts=prompts, tails=tails, outputs=outputs[:row])


def layers(text: Any) -> int:
    """How many there are in a model with this text configuration."""
    return text.layer_types.count(KIND) if text.model_type == "qwen3_5_text" else 0


def products(text: Any) -> int:
    """Multiplications of a token with the states of all layers: two reads and the write of key x value numbers."""
    size = text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim if layers(text) else 0
    return 3 * size * layers(text)


def kept(module: nn.Module) -> int:
    """Numbers of a token that the rule keeps in the layers within a module."""
    found = [one for one in module.modules() if isinstance(one, Qwen3_5GatedDeltaNet)]
    return sum(KEPT * one.num_v_heads * (one.head_k_dim + one.head_v_dim) for one in found)


def pack_layers(model: nn.Module) -> int:
    """Replace the forward pass of a model's layers; returns how far back their convolution sees, 0: it has none."""
    found = [module for module in model.modules() if isinstance(module, Qwen3_5GatedDeltaNet)]
    for layer in found:
        layer.__class__ = PackedGatedDeltaNet
    return max((layer.conv_kernel_size - 1 for layer in found), default=0)


class PackedGatedDeltaNet(Qwen3_5GatedDeltaNet):
    """transformers' layer with another forward pass; its weights are the same."""

    def forward(self, hidden_states: Tensor, attention_mask: Branches, **_: Any) -> Tensor:
        """(1, T, hidden size) -> (1, T, hidden size). What other layers get as their mask are this one's branches."""
        row = hidden_states[0]
        gates = -self.A_log.float().exp() * softplus(self.in_proj_a(row).float() + self.dt_bias)
        inputs = [pad(one, (0, 0, 0, 1)) for one in (self.in_proj_qkv(row), gates, self.in_proj_b(row).sigmoid())]
        prompts = [self._run(block, inputs, None) for block in attention_mask.prompts.values()]
        ends = torch.cat([state for _, state in prompts])
        tails = [self._run(one, inputs, ends.index_select(0, one.origin)) for one in attention_mask.tails.values()]
        mixed = torch.cat([outputs.flatten(0, 1) for outputs, _ in (*prompts, *tails)])
        mixed = mixed.index_select(0, attention_mask.outputs)
        gate = self.in_proj_z(row).view_as(mixed)
        return self.out_proj(self.norm(mixed, gate).flatten(1))[None]

    def _run(self, block: Block, inputs: Sequence[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The rule from these states on: (n, longest part, heads, dim), and the state at each part's end."""
        reach = self.conv_kernel_size - 1
        own = [block.tokens, block.tokens[:, reach:], block.tokens[:, reach:]]
        qkv, gates, beta = (
            one.index_select(0, places.flatten()).unflatten(0, places.shape)
            for one, places in zip(inputs, own, strict=True)
        )
        kernel = self.conv1d.weight.squeeze(1)
        qkv = causal_conv1d_fn(qkv.transpose(1, 2), kernel, self.conv1d.bias, activation=self.activation)
        sizes = [self.key_dim, self.key_dim, self.value_dim]
        dims = [self.head_k_dim, self.head_k_dim, self.head_v_dim]
        parts = qkv.transpose(1, 2)[:, reach:].split(sizes, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, dim)) for part, dim in zip(parts, dims, strict=True))
        query, key = (one.repeat_interleave(self.num_v_heads // self.num_k_heads, 2) for one in (query, key))
        rule = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        return torch_chunk_gated_delta_rule(query, key, value, g=gates, beta=beta, **rule)
