"""Guards FlexAttention as CUDA gets it: what its mask shows, how often it is compiled, never the unfused kernel.

Dynamo traces it on the CPU; its "eager" backend then runs the operator's own definition, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import create_block_mask

from learner import text_attention
from learner.families.packed import row_multiple
from learner.packing import PieceLengths, pack
from learner.policy import load_policy
from learner.rows import pieces
from learner.text_attention import attend, block_mask
from perception.config import LearnerConfig
from tests import tiny_families
from tests.builders import sampled_group

CPU = torch.device("cpu")
BLOCK = 16


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Graphs that Dynamo makes of the kernel in this test. The unfused one raises."""
    made: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(text_attention, "BLOCK", BLOCK)
    monkeypatch.setitem(text_attention.COMPILE, "backend", backend)
    monkeypatch.setattr(flex_attention, "setup_compilation_env", lambda: pytest.fail("the unfused kernel ran"))
    # It only says that no backend but "eager" has a backward pass on the CPU.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    torch._dynamo.reset()
    text_attention._fused.cache_clear()
    yield made
    torch._dynamo.reset()
    text_attention._fused.cache_clear()


def attended(row: int, packed: Any, grad: bool) -> list[Tensor]:
    """The output for its real tokens and, with `grad`, the gradients of query, key and value."""
    generator = torch.Generator().manual_seed(row)
    q, k, v = (torch.randn(1, heads, row, 16, generator=generator, requires_grad=True) for heads in (4, 2, 2))
    with torch.set_grad_enabled(grad):
        out = attend(torch.nn.Identity(), q, k, v, None, packed=packed, scaling=0.3)[0][:, : row - 3]
    return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))] if grad else [out]


def test_ten_lengths_are_ten_graphs_and_exact(graphs: list[Any]) -> None:
    """Every other one without a gradient, and one in both ways. Other parts in a row of a known length are known."""
    for number in range(1, 11):
        row, grad = number * BLOCK, bool(number % 2)
        lengths = (PieceLengths(prompt=row // 2, tails=(row - row // 2 - 3, 0)),)
        ours = attended(row, block_mask(lengths, row, CPU), grad)
        for found, expected in zip(ours, attended(row, lengths, grad), strict=True):
            assert torch.allclose(found, expected, atol=1e-4), row
    assert len(graphs) == 10
    others = block_mask((PieceLengths(prompt=9, tails=(4,) * 9), PieceLengths(prompt=20, tails=(1, 30))), 160, CPU)
    attended(160, others, False)
    assert len(graphs) == 10
    attended(160, others, True)
    assert len(graphs) == 11


def test_one_length_too_many_fails(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(text_attention.COMPILE, "recompile_limit", 2)
    masks = {row: block_mask((PieceLengths(prompt=row - 3, tails=()),), row, CPU) for row in (16, 32, 48)}
    for row in (16, 32, 16):
        attended(row, masks[row], False)
    with pytest.raises(FailOnRecompileLimitHit):
        attended(48, masks[48], False)


def test_whole_layers_are_compiled_once_per_length_for_all_of_them(
    graphs: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`learner.compile`, of which the text layers are left compiled: FlexAttention is then a part of their graph. Four
    variants, where Dynamo's own limit is three."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 3)
    spec = tiny_families.build("qwen2_5_vl", tmp_path)
    policy, plain = (
        load_policy(spec, 0.8, LearnerConfig(compile=compiled), lambda handle: handle.ref) for compiled in (True, False)
    )
    policy.head._chunk = policy.head._logprobs
    for block in policy.model.model.visual.blocks:
        block._compiled_call_impl = None
    work = list(pieces([sampled_group(spec, np.random.default_rng(0), n=3)], policy.layout, 1 << 20))
    for multiple in (192, 208):
        batch = pack(work, policy.layout, multiple)
        assert batch.computed == multiple
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                expected = plain(batch)[0]
                with patch.object(text_attention, "packed_mask", block_mask):
                    found = policy(batch)[0]
            assert (found - expected).abs().max() < 1e-5
    assert len(graphs) == 4


lengths = st.builds(PieceLengths, prompt=st.integers(1, 40), tails=st.lists(st.integers(0, 30), max_size=4).map(tuple))


@settings(max_examples=60, deadline=None)
@given(st.lists(lengths, min_size=1, max_size=4), st.integers(0, 20), st.sampled_from([4, 8, 16]))
def test_a_block_is_full_partial_or_absent_as_its_pairs_are(made: list[PieceLengths], padding: int, block: int) -> None:
    """The very tensors that torch makes of a table of all pairs, which is the definition."""
    row = sum(one.total for one in made) + padding
    with patch.object(text_attention, "BLOCK", block):
        ours = block_mask(made, row, CPU)
    stock = create_block_mask(ours.mask_mod, None, None, row, row, device="cpu", BLOCK_SIZE=block)
    assert ours.shape == stock.shape and ours.BLOCK_SIZE == stock.BLOCK_SIZE
    for name in ours._TENSOR_ATTRS:
        one, other = getattr(ours, name), getattr(stock, name)
        assert one is other is None or (one.dtype == other.dtype and torch.equal(one, other)), name


@pytest.mark.parametrize("micro_tokens", [90, 2048, 8192, 16384, 20000])
def test_lengths_of_rows_are_few(micro_tokens: int) -> None:
    def lengths(most: int) -> set[int]:
        return {-(-tokens // m) * m for tokens in range(1, most + 1) for m in [row_multiple(tokens, micro_tokens)]}

    assert len(lengths(micro_tokens)) <= 16 and len(lengths(8 * micro_tokens)) <= 40
    assert all(length % 128 == 0 for length in lengths(2 * micro_tokens))
    assert max(lengths(micro_tokens)) < micro_tokens + 16 * 128
