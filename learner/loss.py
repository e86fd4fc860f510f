"""The objective on flat token vectors: pure functions, no model, no process group.

Every vector is (N,): the N sampled tokens of a micro-batch, whatever row they came from. Losses and statistics are
SUMS, so that a step cut into micro-batches over ranks adds up to exactly the uncut step; one division comes at the end.

Three policies: the rollout policy (the engine that sampled), the old policy (the learner before the batch) and the
current one. The ratio current / old is clipped; the truncated weight old / rollout corrects what separates engine and
learner (decoupled PPO, arXiv 2110.00641; truncated importance sampling, Yao et al. 2025, "Your efficient RL framework
secretly brings you off-policy RL training"). The KL is to a fourth, the reference, with which training started.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from perception import metric_catalog as catalog
from perception.config import AlgorithmConfig
from perception.registry import Registry

K3_CAP = 10.0
_LARGEST_DELTA = 20.0  # an infinite exponential would make the gradient NaN even where it is cut


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """What the objective needs to know of N sampled tokens, beside the current policy's log-probs. All (N,)."""

    rollout_logprobs: Tensor
    """float32, as the rollout engine reported them."""
    advantages: Tensor
    """float32; the same for all tokens of a trajectory."""
    loss_mask: Tensor
    """float32: 1 for a real token, 0 for a filler that only keeps the ranks in step."""
    sequence: Tensor
    """int64, ascending from 0 without a gap: which trajectory the token belongs to; all its tokens are in this
    micro-batch."""
    old_logprobs: Tensor | None = None
    """float32, the old policy's; None in the only step over a batch, where the current policy is the old one."""
    reference_logprobs: Tensor | None = None
    """float32, the starting policy's, where a KL to it is wanted."""


@dataclass(frozen=True, slots=True)
class Surrogate:
    """A policy loss on N tokens. All (N,)."""

    loss: Tensor
    clipped_low: Tensor
    """bool: beyond the lower bound, where that takes the token's gradient."""
    clipped_high: Tensor


SURROGATES: Registry[Callable[[Tensor, Tensor, TokenBatch, AlgorithmConfig], Surrogate]] = Registry("surrogate")
"""Policy losses by the name that `algorithm.loss` takes: (log-probs, old log-probs, batch, settings) -> `Surrogate`.
With c = clip(ratio, 1 - clip_low, 1 + clip_high) and ratio = current / old."""


@SURROGATES.register("ppo")
def ppo(logprobs: Tensor, old: Tensor, batch: TokenBatch, config: AlgorithmConfig) -> Surrogate:
    """-min(ratio A, c A), a ratio per token (PPO, arXiv 1707.06347; two bounds: DAPO, arXiv 2503.14476)."""
    return _clipped(torch.exp(logprobs - old), batch, config)


@SURROGATES.register("gspo")
def gspo(logprobs: Tensor, old: Tensor, batch: TokenBatch, config: AlgorithmConfig) -> Surrogate:
    """The same with the trajectory's ratio, (prod_t ratio_t)^(1/T) (GSPO, arXiv 2507.18071, eq. 5 to 7).

    Each of its T tokens carries the trajectory's term, so that aggregate=sequence is the paper's mean over
    trajectories; with token and constant a trajectory counts T times.
    """
    return _clipped(torch.exp(over_trajectory(logprobs - old, batch) / _lengths(batch)), batch, config)


@SURROGATES.register("cispo")
def cispo(logprobs: Tensor, old: Tensor, batch: TokenBatch, config: AlgorithmConfig) -> Surrogate:
    """-stop_gradient(c) A log pi (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5). No lower bound there: clip_low >= 1.

    It clips on either side whatever the advantage.
    """
    ratio, (low, high) = torch.exp(logprobs - old), _bounds(config)
    return Surrogate(-ratio.clamp(low, high).detach() * batch.advantages * logprobs, ratio < low, ratio > high)


def policy_loss(logprobs: Tensor, entropy: Tensor, batch: TokenBatch, config: AlgorithmConfig) -> Tensor:
    """Scalar: sum over tokens of w * surrogate + kl_coef * KL - entropy_coef * entropy, weighted as `aggregate` says.

    Summed over all micro-batches of all ranks and divided by `denominator`, it is the objective.

    Where importance=none the rollout policy takes the old policy's place. w = min(old / rollout, importance_cap) per
    token or trajectory, without gradient. The gradient of k1 is that of log pi alone: zero in expectation, only k3
    pulls to the reference (arXiv 2506.09477).
    """
    old = _old_policy(logprobs, batch, config)
    surrogate = SURROGATES[config.loss](logprobs, old, batch, config)
    loss = _importance(old, batch, config).clamp(max=config.importance_cap) * surrogate.loss
    if batch.reference_logprobs is not None and config.kl_in == "loss":
        loss = loss + config.kl_coef * kl(logprobs, batch.reference_logprobs, config.kl)
    if config.entropy_coef > 0:
        loss = loss - config.entropy_coef * entropy
    if config.aggregate == "sequence":
        loss = loss / _lengths(batch)
    return (loss * batch.loss_mask).sum()


def denominator(config: AlgorithmConfig, *, tokens: float, sequences: float, max_new_tokens: int) -> float:
    """The number by which the summed loss of a mini-batch, over all ranks, is divided.

    token: its sampled tokens (DAPO, arXiv 2503.14476); sequence: its trajectories (GRPO, arXiv 2402.03300); constant:
    trajectories x max_new_tokens (Dr. GRPO, arXiv 2503.20783).
    """
    if config.aggregate == "token":
        return tokens
    return sequences if config.aggregate == "sequence" else sequences * max_new_tokens


def kl(logprobs: Tensor, reference_logprobs: Tensor, form: Literal["k1", "k3"]) -> Tensor:
    """(N,) unbiased estimates of KL(pi || pi_ref) in nats (Schulman 2020, "Approximating KL divergence").

    k1 = -log r, k3 = r - 1 - log r >= 0, with r = pi_ref / pi. k3 grows like r, so it is cut at 10 as in verl
    (`low_var_kl`): beyond that it has no gradient, and no single token can make the step.
    """
    delta = reference_logprobs - logprobs
    if form == "k1":
        return -delta
    return (torch.expm1(delta.clamp(max=_LARGEST_DELTA)) - delta).clamp(max=K3_CAP)


@torch.no_grad()
def token_sums(logprobs: Tensor, entropy: Tensor, batch: TokenBatch, config: AlgorithmConfig) -> dict[str, Tensor]:
    """Sums over the loss mask of every per-token statistic, by metric name; KL only with `reference_logprobs`."""
    old = _old_policy(logprobs, batch, config)
    surrogate = SURROGATES[config.loss](logprobs, old, batch, config)
    weight = _importance(old, batch, config)
    values = {
        catalog.RATIO: torch.exp(logprobs - batch.rollout_logprobs),
        catalog.LOGPROB_MISMATCH: (logprobs - batch.rollout_logprobs).abs(),
        catalog.ENTROPY: entropy,
        catalog.CLIP_LOW: surrogate.clipped_low,
        catalog.CLIP_HIGH: surrogate.clipped_high,
        catalog.IMPORTANCE: weight.clamp(max=config.importance_cap),
        catalog.IMPORTANCE_CAPPED: weight > config.importance_cap,
    }
    if batch.reference_logprobs is not None:
        values[catalog.KL] = kl(logprobs, batch.reference_logprobs, config.kl)
    return {name: (value * batch.loss_mask).sum() for name, value in values.items()}


def _old_policy(logprobs: Tensor, batch: TokenBatch, config: AlgorithmConfig) -> Tensor:
    if config.importance == "none":
        return batch.rollout_logprobs
    return logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs


def _bounds(config: AlgorithmConfig) -> tuple[float, float]:
    return 1.0 - config.clip_low, 1.0 + config.clip_high


def _clipped(ratio: Tensor, batch: TokenBatch, config: AlgorithmConfig) -> Surrogate:
    """-min(ratio A, c A): a token is clipped beyond the bound in the direction its advantage points to."""
    low, high = _bounds(config)
    loss = -torch.minimum(ratio * batch.advantages, ratio.clamp(low, high) * batch.advantages)
    return Surrogate(loss, (ratio < low) & (batch.advantages < 0), (ratio > high) & (batch.advantages > 0))


def _importance(old: Tensor, batch: TokenBatch, config: AlgorithmConfig) -> Tensor:
    """(N,) old / rollout before truncation, of the token or its trajectory; 1 where the two are one policy."""
    gap = old - batch.rollout_logprobs
    return torch.exp(over_trajectory(gap, batch) if config.importance == "sequence" else gap)


def _lengths(batch: TokenBatch) -> Tensor:
    """(N,) real tokens of the token's trajectory; 1 for a trajectory of fillers."""
    return over_trajectory(torch.ones_like(batch.loss_mask), batch).clamp(min=1.0)


def over_trajectory(values: Tensor, batch: TokenBatch) -> Tensor:
    """(N,) sum of `values` over the real tokens of the token's trajectory."""
    sums = torch.zeros_like(values).index_add(0, batch.sequence, values * batch.loss_mask)
    return sums.index_select(0, batch.sequence)
