"""Surrogate `reinforce`: the plain policy gradient, nothing clipped (Williams, 1992)."""

from __future__ import annotations

import torch
from torch import Tensor

from learner.loss import SURROGATES, Surrogate, TokenBatch
from perception.config import AlgorithmConfig


@SURROGATES.register("reinforce")
def reinforce(logprobs: Tensor, old: Tensor, batch: TokenBatch, config: AlgorithmConfig) -> Surrogate:
    """-A log pi."""
    unclipped = torch.zeros_like(logprobs, dtype=torch.bool)
    return Surrogate(-batch.advantages * logprobs, unclipped, unclipped)
