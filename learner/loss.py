"""The objective on flat token vectors: pure functions, no model, no process group.

Every vector is (N,): the N sampled tokens of a micro-batch, whatever row they came from. Losses and statistics are
SUMS, so that a step cut into micro-batches over ranks adds up to exactly the uncut step; one division comes at the end.

Three policies: the engine that sampled, the old policy (the learner before the batch), the current one. The ratio
current / old is clipped; the truncated weight old / engine corrects what separates learner and engine (decoupled PPO,
arXiv 2110.00641; truncated importance sampling, Yao et al. 2025, "Your efficient RL framework secretly brings you
off-policy RL training").
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from perception import metric_catalog as catalog
from perception.config import AlgorithmConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """What the objective needs to know of N sampled tokens. All (N,)."""

    engine_logprobs: Tensor
    """float32, as the engine reported them."""
    advantages: Tensor
    """float32; the same for all tokens of a trajectory."""
    real: Tensor
    """float32: 1 for a real token, 0 for a filler that only keeps the ranks in step."""
    sequence: Tensor
    """int64, ascending: which trajectory the token belongs to; all its tokens are in this micro-batch."""

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


def policy_loss(
    logprobs: Tensor,
    entropy: Tensor,
    batch: TokenBatch,
    config: AlgorithmConfig,
    *,
    old_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
) -> Tensor:
    """Scalar: sum over tokens of w * surrogate + kl_coef * KL - entropy_coef * entropy, weighted as `aggregate` says.

    Summed over all micro-batches of all ranks and divided by `denominator`, it is the objective. Surrogates, with
    c = clip(ratio, 1 - clip_low, 1 + clip_high):

        ppo    -min(ratio A, c A), a ratio per token (PPO, arXiv 1707.06347; two bounds: DAPO, arXiv 2503.14476)
        gspo   the same with the trajectory's ratio, (prod_t ratio_t)^(1/T) (GSPO, arXiv 2507.18071, eq. 5 to 7). Each
               of its T tokens carries the trajectory's term, so that aggregate=sequence is the paper's mean over
               trajectories; with token and constant a trajectory counts T times.
        cispo  -stop_gradient(c) A log pi (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5). The paper sets no lower bound:
               clip_low >= 1.

    The old policy is the engine where importance=none; else `old_logprobs` or, in the only step over a batch, the
    current policy itself. w = min(old / engine, importance_cap) per token or trajectory, without gradient. The
    gradient of k1 is that of log pi alone: zero in expectation, only k3 pulls to the reference (arXiv 2506.09477).
    """
    old = _old_policy(logprobs, batch, config, old_logprobs)
    surrogate = _surrogate(_ratio(logprobs, old, batch, config), logprobs, batch, config)
    loss = _importance(old, batch, config).clamp(max=config.importance_cap) * surrogate
    if reference_logprobs is not None and config.kl_in == "loss":
        loss = loss + config.kl_coef * kl(logprobs, reference_logprobs, config.kl)
    if config.entropy_coef > 0:
        loss = loss - config.entropy_coef * entropy
    if config.aggregate == "sequence":
        loss = loss / _lengths(batch)
    return (loss * batch.real).sum()


def denominator(config: AlgorithmConfig, *, tokens: float, sequences: float, max_new_tokens: int) -> float:
    """What the summed loss of a mini-batch over all ranks is divided by.

    token: its sampled tokens (DAPO, arXiv 2503.14476); sequence: its trajectories (GRPO, arXiv 2402.03300); constant:
    trajectories x max_new_tokens (Dr. GRPO, arXiv 2503.20783).
    """
    if config.aggregate == "token":
        return tokens
    return sequences if config.aggregate == "sequence" else sequences * max_new_tokens


def kl(logprobs: Tensor, reference_logprobs: Tensor, form: Literal["k1", "k3"]) -> Tensor:
    """(N,) unbiased estimates of KL(pi || pi_ref) in nats (Schulman 2020, "Approximating KL divergence").

    k1 = -log r, k3 = r - 1 - log r >= 0, with r = pi_ref / pi.
    """
    delta = reference_logprobs - logprobs
    return -delta if form == "k1" else torch.expm1(delta) - delta


@torch.no_grad()
def token_sums(
    logprobs: Tensor,
    entropy: Tensor,
    batch: TokenBatch,
    config: AlgorithmConfig,
    *,
    old_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
) -> dict[str, Tensor]:
    """Sums over the real tokens of every per-token statistic, by metric name; KL only with `reference_logprobs`.

    A token counts as clipped where that takes its gradient: beyond a bound in the direction the advantage points to.
    cispo clips on either side whatever the advantage.
    """
    old = _old_policy(logprobs, batch, config, old_logprobs)
    ratio = _ratio(logprobs, old, batch, config)
    weight = _importance(old, batch, config)
    either = config.loss == "cispo"
    values = {
        catalog.RATIO: torch.exp(logprobs - batch.engine_logprobs),
        catalog.LOGPROB_MISMATCH: (logprobs - batch.engine_logprobs).abs(),
        catalog.ENTROPY: entropy,
        catalog.CLIP_LOW: (ratio < 1.0 - config.clip_low) & ((batch.advantages < 0) | either),
        catalog.CLIP_HIGH: (ratio > 1.0 + config.clip_high) & ((batch.advantages > 0) | either),
        catalog.IMPORTANCE: weight.clamp(max=config.importance_cap),
        catalog.IMPORTANCE_CAPPED: weight > config.importance_cap,
    }
    if reference_logprobs is not None:
        values[catalog.KL] = kl(logprobs, reference_logprobs, config.kl)
    return {name: (value * batch.real).sum() for name, value in values.items()}


def _old_policy(logprobs: Tensor, batch: TokenBatch, config: AlgorithmConfig, old_logprobs: Tensor | None) -> Tensor:
    if config.importance == "none":
        return batch.engine_logprobs
    return logprobs.detach() if old_logprobs is None else old_logprobs


def _ratio(logprobs: Tensor, old: Tensor, batch: TokenBatch, config: AlgorithmConfig) -> Tensor:
    """(N,) current / old, of the token or (gspo) of its trajectory."""
    gap = logprobs - old
    return torch.exp(_over_trajectory(gap, batch) / _lengths(batch) if config.loss == "gspo" else gap)


def _surrogate(ratio: Tensor, logprobs: Tensor, batch: TokenBatch, config: AlgorithmConfig) -> Tensor:
    clipped = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    if config.loss == "cispo":
        return -clipped.detach() * batch.advantages * logprobs
    return -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)


def _importance(old: Tensor, batch: TokenBatch, config: AlgorithmConfig) -> Tensor:
    """(N,) old / engine before truncation, of the token or its trajectory; 1 where the engine is the old policy."""
    gap = old - batch.engine_logprobs
    return torch.exp(_over_trajectory(gap, batch) if config.importance == "sequence" else gap)


def _lengths(batch: TokenBatch) -> Tensor:
    """(N,) real tokens of the token's trajectory; 1 for a trajectory of fillers."""
    return _over_trajectory(torch.ones_like(batch.real), batch).clamp(min=1.0)


def _over_trajectory(values: Tensor, batch: TokenBatch) -> Tensor:
    """(N,) sum of `values` over the real tokens of the token's trajectory."""
    index = torch.unique_consecutive(batch.sequence, return_inverse=True)[1]
    return torch.zeros_like(values).index_add(0, index, values * batch.real)[index]
