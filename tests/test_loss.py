"""Guards the GRPO objective: numbers worked out by hand, and sums that do not depend on how a step is cut."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.loss import TokenBatch, k3, policy_loss, token_sums
from perception import names

LOG2 = math.log(2.0)
CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def batch(old: list[float], advantages: list[float], weights: list[float] | None = None) -> TokenBatch:
    return TokenBatch(
        old_logprobs=torch.tensor(old),
        advantages=torch.tensor(advantages),
        weights=torch.tensor(weights or [1.0] * len(old)),
    )


def test_loss_by_hand() -> None:
    # Ratios 1, 2, 2, 1/2, 1/2 against the bounds 0.8 and 1.3.
    logprobs = torch.tensor([-1.0, -1.0, -1.0, -1.0 - LOG2, -1.0 - LOG2])
    tokens = batch([-1.0, -1.0 - LOG2, -1.0 - LOG2, -1.0, -1.0], [3.0, 1.0, -1.0, 1.0, -1.0])
    # min(rA, clip(r)A): 3; 1.3 (clipped); -2 (not clipped: worse is worse); 0.5; -0.8 (clipped)
    assert policy_loss(logprobs, tokens, **CLIP).item() == pytest.approx(-(3.0 + 1.3 - 2.0 + 0.5 - 0.8), abs=1e-6)


def test_kl_by_hand() -> None:
    # r = pi_ref / pi = 2: k3 = 2 - 1 - ln 2
    assert k3(torch.tensor([-1.0]), torch.tensor([-1.0 + LOG2])).item() == pytest.approx(1.0 - LOG2, abs=1e-6)
    loss = policy_loss(
        torch.tensor([-1.0]),
        batch([-1.0], [0.0]),
        **CLIP,
        reference_logprobs=torch.tensor([-1.0 + LOG2]),
        kl_coef=0.5,
    )
    assert loss.item() == pytest.approx(0.5 * (1.0 - LOG2), abs=1e-6)


def test_gradient_is_minus_ratio_times_advantage_and_zero_where_clipped() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -1.0 - LOG2], requires_grad=True)
    policy_loss(logprobs, batch([-1.0, -1.0 - LOG2, -1.0], [3.0, 1.0, -1.0]), **CLIP).backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-3.0, 0.0, 0.0])


def test_statistics_by_hand() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -1.0 - LOG2, -1.0 - LOG2])
    tokens = batch([-1.0, -1.0 - LOG2, -1.0, -1.0], [3.0, 1.0, -1.0, 1.0])
    sums = token_sums(logprobs, torch.tensor([0.1, 0.2, 0.3, 0.4]), tokens, **CLIP, reference_logprobs=logprobs)
    assert sums[names.RATIO].item() == pytest.approx(1.0 + 2.0 + 0.5 + 0.5)
    assert sums[names.LOGPROB_MISMATCH].item() == pytest.approx(3 * LOG2)
    assert sums[names.ENTROPY].item() == pytest.approx(1.0)
    assert sums[names.CLIP_HIGH].item() == 1
    assert sums[names.CLIP_LOW].item() == 1  # the last token is below the bound, but its advantage is positive
    assert sums[names.KL].item() == 0.0


@given(
    st.lists(st.tuples(*[st.floats(-3, 0, width=32)] * 3, st.floats(-2, 2, width=32)), min_size=2, max_size=20),
    st.data(),
)
def test_pieces_add_up_and_weight_zero_counts_nowhere(rows: list[tuple[float, ...]], data: st.DataObject) -> None:
    new, old, reference, advantages = torch.tensor(rows, dtype=torch.float64).T

    def sums(part: slice, weight: float = 1.0) -> list[float]:
        tokens = TokenBatch(
            old_logprobs=old[part], advantages=advantages[part], weights=torch.full_like(old[part], weight)
        )
        loss = policy_loss(new[part], tokens, **CLIP, reference_logprobs=reference[part], kl_coef=0.1)
        values = token_sums(new[part], new[part] ** 2, tokens, **CLIP, reference_logprobs=reference[part])
        return [loss.item(), *(value.item() for value in values.values())]

    cut = data.draw(st.integers(1, len(rows) - 1))
    pieces = [a + b for a, b in zip(sums(slice(cut)), sums(slice(cut, None)), strict=True)]
    assert sums(slice(None)) == pytest.approx(pieces, abs=1e-9)
    assert sums(slice(None), weight=0.0) == [0.0] * len(pieces)


@given(st.floats(-20, 0), st.floats(-20, 0))
def test_k3_is_never_negative(a: float, b: float) -> None:
    assert k3(torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64)).item() >= -1e-12
