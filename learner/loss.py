"""The GRPO objective on flat token vectors: pure functions, no model, no process group.

Every vector is (N,): the N sampled tokens of a micro-batch, whatever row they came from. Losses and statistics are
SUMS, so that a step cut into micro-batches over ranks adds up to exactly the uncut step; one division comes at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perception import names


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """What the objective needs to know of N sampled tokens. All (N,) float32."""

    old_logprobs: Tensor
    """Under the policy that sampled them, as the engine reported."""
    advantages: Tensor
    weights: Tensor
    """1 for a real token, 0 for a filler that only keeps the ranks in step."""


def policy_loss(
    logprobs: Tensor,
    batch: TokenBatch,
    *,
    clip_low: float,
    clip_high: float,
    reference_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
) -> Tensor:
    """Sum over tokens of -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + kl_coef * k3, a scalar.

    rho = exp(log pi - log pi_old), clipped as in PPO (arXiv 1707.06347) with separate bounds (DAPO, arXiv 2503.14476).
    """
    ratio = torch.exp(logprobs - batch.old_logprobs)
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    per_token = -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    if reference_logprobs is not None:
        per_token = per_token + kl_coef * k3(logprobs, reference_logprobs)
    return (per_token * batch.weights).sum()


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """(N,) r - 1 - log r with r = pi_ref / pi: unbiased and >= 0 as an estimate of KL(pi || pi_ref) (Schulman 2020)."""
    delta = reference_logprobs - logprobs
    return torch.expm1(delta) - delta


@torch.no_grad()
def token_sums(
    logprobs: Tensor,
    entropy: Tensor,
    batch: TokenBatch,
    *,
    clip_low: float,
    clip_high: float,
    reference_logprobs: Tensor | None = None,
) -> dict[str, Tensor]:
    """Weighted sums over the tokens of every per-token statistic, by metric name.

    A token counts as clipped where the clip is active: ratio below 1 - clip_low with a negative advantage, or above
    1 + clip_high with a positive one.
    """
    log_ratio = logprobs - batch.old_logprobs
    ratio = torch.exp(log_ratio)
    values = {
        names.RATIO: ratio,
        names.LOGPROB_MISMATCH: log_ratio.abs(),
        names.ENTROPY: entropy,
        names.CLIP_LOW: (ratio < 1.0 - clip_low) & (batch.advantages < 0),
        names.CLIP_HIGH: (ratio > 1.0 + clip_high) & (batch.advantages > 0),
    }
    if reference_logprobs is not None:
        values[names.KL] = k3(logprobs, reference_logprobs)
    return {name: (value * batch.weights).sum() for name, value in values.items()}
