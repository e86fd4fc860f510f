"""Guards the pure parts of packing: bins, what may see what, the CPU's attention, the count of useful FLOPs."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from learner.families.qwen_vl import FlopCounter
from learner.flops import MatrixRate
from learner.packing import PieceLengths, pack, token_parts
from learner.policy import load_policy
from learner.rows import Layout, Piece, Segment, Tail, bins, pieces, token_batch
from learner.text_attention import attend, packed_mask
from perception.config import LearnerConfig, LoraConfig
from tests import tiny_policy
from tests.builders import sampled_group

NO_IMAGES = Layout(image_token_id=-1, shown_id=-1, filler_id=0, picture=lambda handle: pytest.fail("no image"))
spans = st.lists(
    st.builds(PieceLengths, prompt=st.integers(1, 7), tails=st.lists(st.integers(0, 5), max_size=4).map(tuple)),
    min_size=1,
    max_size=4,
)


def piece(prompt: int, *tails: int) -> Piece:
    segment = Segment(ids=torch.zeros(prompt, dtype=torch.int64), pictures=(), positions=torch.zeros(3, 0))
    made = tuple(Tail(0, i, 1.0, length=length, targets=(1,) * (length + 1)) for i, length in enumerate(tails))
    return Piece(prompt=segment, tails=made)


def visible(spans: list[PieceLengths], length: int) -> torch.Tensor:
    """(T, T) bool by the definition, token by token: (piece, tail) of both, the prompt being tail -1."""
    names = [(i, j) for i, s in enumerate(spans) for j, n in ((-1, s.prompt), *enumerate(s.tails)) for _ in range(n)]
    names += [(-1, -2)] * (length - len(names))
    table = torch.zeros(length, length, dtype=torch.bool)
    for q, (group, part) in enumerate(names):
        for k in range(q + 1):
            table[q, k] = names[k] in {(group, part), (group, -1)}
    return table


@given(spans, st.integers(0, 9))
def test_every_token_sees_its_prompt_and_its_own_tail_only(made: list[PieceLengths], padding: int) -> None:
    length = sum(one.total for one in made) + padding
    part, prompt = token_parts(made, length)
    q, k = torch.arange(length)[:, None], torch.arange(length)[None]
    mask = (k <= q) & ((part[k] == part[q]) | (part[k] == prompt[q]))
    assert torch.equal(mask, visible(made, length))


@settings(max_examples=40)
@given(spans, st.sampled_from([(4, 4), (4, 2), (2, 1)]), st.integers(0, 3))
def test_attention_by_parts_is_attention_under_the_whole_mask(
    made: list[PieceLengths], heads: tuple[int, int], padding: int
) -> None:
    length = sum(one.total for one in made) + padding
    torch.manual_seed(length)
    query, key, value = (torch.randn(1, h, length, 8) for h in (heads[0], heads[1], heads[1]))
    mask = packed_mask(made, length, torch.device("cpu"))
    ours, _ = attend(torch.nn.Identity(), query, key, value, None, packed=mask, scaling=0.3)
    whole = scaled_dot_product_attention(
        query, key, value, attn_mask=visible(made, length), scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    real = length - padding
    assert ours.shape == whole.shape
    assert torch.allclose(ours[:, :real], whole[:, :real], atol=1e-5)
    assert not ours[:, real:].any()


@given(st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(0, 30), min_size=1, max_size=6)), max_size=9))
def test_bins_hold_every_piece_once_within_the_budget(groups: list[tuple[int, list[int]]]) -> None:
    work = [piece(prompt, *tails) for prompt, tails in groups]
    for padded in (False, True):
        size = lambda p: p.cost(padded)  # noqa: B023, E731
        filled = bins(work, 100, padded)
        assert sorted(id(p) for b in filled for p in b) == sorted(map(id, work))
        assert all(sum(map(size, b)) <= 100 or len(b) == 1 for b in filled)
        # First fit: two bins that are not full never fit into one.
        assert all(sum(map(size, a)) + sum(map(size, b)) > 100 for a, b in pairwise(filled))


def test_sizes_of_a_piece_by_hand() -> None:
    one = piece(10, 3, 0, 5)
    assert (one.packed, one.rows) == (one.cost(padded=False), 38) == (18, 38)
    assert one.cost(padded=True) == 45


def test_a_group_longer_than_the_budget_is_cut_between_its_trajectories(tmp_path: Path) -> None:
    spec = tiny_policy.build(tmp_path)
    entry = sampled_group(spec, np.random.default_rng(0), n=6, images=0, prompt_tokens=20, answer_tokens=12)
    whole = list(pieces([entry], NO_IMAGES, 10_000))
    assert [len(p.tails) for p in whole] == [6]
    cut = list(pieces([entry], NO_IMAGES, 35))
    assert len(cut) > 1 and all(p.packed <= 35 for p in cut)
    assert [t.trajectory for p in cut for t in p.tails] == list(range(6))
    assert [len(p.tails) for p in pieces([entry], NO_IMAGES, 1)] == [1] * 6


def test_a_row_by_hand() -> None:
    """Prompt 7 8 9; answers 4 5 6 and 3: their last tokens are not in the row, their first follow the prompt's last."""
    prompt = Segment(ids=torch.tensor([7, 8, 9]), pictures=(), positions=torch.arange(3).expand(3, -1))
    long = Tail(0, 0, 0.5, targets=(4, 5, 6), logprobs=(-1.0, -2.0, -3.0), length=2)
    long.ids, long.sampled = [torch.tensor([4, 5, 6])], [torch.arange(3)]
    long.positions = [torch.tensor([3, 4, 5]).expand(3, -1)]
    short = Tail(0, 1, -0.5, targets=(3,), logprobs=(-4.0,), length=0)
    short.ids, short.sampled, short.positions = [torch.tensor([3])], [torch.arange(1)], [torch.tensor([[3]] * 3)]
    batch = pack([Piece(prompt=prompt, tails=(long, short))], NO_IMAGES, multiple=4)
    assert batch.input_ids.tolist() == [[7, 8, 9, 4, 5, 0, 0, 0]]
    assert batch.position_ids[0].tolist() == [[0, 1, 2, 3, 4, 0, 0, 0]]
    assert batch.lengths == (PieceLengths(prompt=3, tails=(2, 0)),)
    assert batch.predictors.tolist() == [2, 3, 4, 2]
    assert batch.targets.tolist() == [4, 5, 6, 3]
    assert batch.tokens.rollout_logprobs.tolist() == [-1.0, -2.0, -3.0, -4.0]
    assert batch.tokens.advantages.tolist() == [0.5, 0.5, 0.5, -0.5]
    assert batch.tokens.sequence.tolist() == [0, 0, 0, 1]
    assert batch.tokens.loss_mask.tolist() == [1.0] * 4
    assert batch.image_slots.numel() == 0 and batch.pictures == ()


def test_a_fillers_token_is_masked() -> None:
    assert token_batch([]).loss_mask.tolist() == [0.0]
    assert pack([], NO_IMAGES).input_ids.tolist() == [[0]]


def test_useful_flops_by_hand(tmp_path: Path) -> None:
    """The tiny policy: 2 text layers of 64 wide, 2 heads of 32, 1 key head; vision 2 blocks of 64, the second one over
    the whole image, windows of 8 x 8 patches; one image of 12 x 12 patches, merged 2 x 2."""
    spec = tiny_policy.build(tmp_path)
    policy = load_policy(spec, 1.0, LearnerConfig(), lambda handle: handle.ref)
    entry = sampled_group(spec, np.random.default_rng(3), n=2, side=168)
    (work,) = pieces([entry], policy.layout, 1 << 20)
    first, second = (t.sampled_tokens for t in entry.trajectories)
    prompt = len(entry.prompt.token_ids) - 1 + 36
    tails = (first - 1, second - 1)
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128
    pairs = math.comb(prompt + 1, 2) + sum(n * prompt + math.comb(n + 1, 2) for n in tails)
    text = 2 * 2 * layer * (prompt + sum(tails)) + 4 * 64 * 2 * pairs + 2 * 64 * 263 * (first + second)
    block = 64 * 192 + 64 * 64 + 3 * 64 * 128
    windows = 64**2 + 2 * 32**2 + 16**2  # 8x8, two of 8x4, 4x4 patches
    vision = 2 * (2 * block + 3 * 2 * 14 * 14 * 64) * 144 + 2 * (256 * 256 + 256 * 64) * 36
    vision += 4 * 64 * (windows + 144**2)
    count = FlopCounter(policy.model, vision_trained=True, adapters=False)
    assert count([work]) == 3 * (text + vision)
    assert FlopCounter(policy.model, vision_trained=False, adapters=False)([work]) == 3 * text + vision
    assert count([work, work]) == 6 * text + 3 * vision  # the image once


def test_adapters_need_no_gradient_of_the_weights(tmp_path: Path) -> None:
    spec = tiny_policy.build(tmp_path)
    entry = sampled_group(spec, np.random.default_rng(3), n=2, images=0)
    plain = load_policy(spec, 1.0, LearnerConfig(), lambda handle: handle.ref)
    (work,) = pieces([entry], plain.layout, 1 << 20)
    full = FlopCounter(plain.model, vision_trained=True, adapters=False)([work])
    adapted = load_policy(spec, 1.0, LearnerConfig(lora=LoraConfig(rank=2)), lambda handle: handle.ref)
    less = FlopCounter(adapted.model, vision_trained=False, adapters=True)([work])
    assert 2 / 3 < less / full < 0.75  # two thirds, and the adapters' own


def test_the_rate_of_a_matrix_product_only_ever_rises() -> None:
    rate = MatrixRate(torch.device("cpu"), torch.float32)
    measured = [rate.measure() for _ in range(5)]
    assert measured[0] > 1e8 and measured == sorted(measured)
