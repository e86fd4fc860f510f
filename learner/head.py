"""Vocabulary head: hidden states -> log-probs of the sampled tokens and entropies, in chunks of logits."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from learner.transfer import to_device
from perception.types import BANNED_LOGIT

CHUNK_LOGITS = 1 << 26
"""Logits held at once; more tokens go through in chunks that the backward pass computes again."""


class VocabularyHead:
    """The distribution that is sampled from, in float32: softmax of (logits, banned ids masked) / temperature.

    Peak memory does not depend on the number of tokens. The entropy carries a gradient only if asked to.
    """

    def __init__(self, linear: nn.Module, banned: Tensor, temperature: float, entropy_gradient: bool, compiled: bool):
        self._linear, self._banned, self._temperature = linear, banned, temperature
        self._entropy_gradient = entropy_gradient
        self._chunk = torch.compile(self._logprobs, dynamic=True) if compiled else self._logprobs

    def __call__(self, hidden: Tensor, targets: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        """(N, hidden size), (N,) -> (N,) float32 log pi(target) and (N,) float32 entropy in nats."""
        rows = max(1, CHUNK_LOGITS // vocabulary)
        if len(hidden) <= rows:
            return self._chunk(hidden, targets)
        pairs = zip(hidden.split(rows), targets.split(rows), strict=True)
        chunks = [checkpoint(self._chunk, h, t, use_reentrant=False) for h, t in pairs]
        logprobs, entropies = zip(*chunks, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _logprobs(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._linear(hidden).float()
        logits = logits.index_fill_(1, to_device(self._banned, logits.device), BANNED_LOGIT)
        if self._temperature != 1.0:
            logits = logits / self._temperature
        normaliser = logits.logsumexp(-1)
        logprobs = logits.gather(1, targets[:, None]).squeeze(1) - normaliser
        with torch.set_grad_enabled(self._entropy_gradient and torch.is_grad_enabled()):
            expected = (torch.exp(logits - normaliser[:, None]) * logits).sum(-1)
            entropy = normaliser - expected
        return logprobs, entropy
