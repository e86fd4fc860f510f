"""Vocabulary head: hidden states -> log-probs of the sampled tokens and entropies, in chunks of logits."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from learner.transfer import to_device
from perception.types import BANNED_LOGIT

CHUNK_LOGITS = 1 << 26
"""Logits held at once; more tokens go through in chunks that the backward pass computes again."""


class VocabularyHead(nn.Module):
    """The distribution that is sampled from, in float32: softmax of (logits, banned ids masked) / temperature.

    Peak memory does not depend on the number of tokens. The entropy carries a gradient only if asked to. A module, so
    that ZeRO-3 gathers the weight once for all chunks, of which ranks have different numbers.
    """

    def __init__(self, linear: nn.Linear, banned: Tensor, temperature: float, entropy_gradient: bool, compiled: bool):
        super().__init__()
        self._linear = [linear]  # in a list, it stays a module of the model alone
        self._banned, self._temperature = banned, temperature
        self._entropy_gradient = entropy_gradient
        self._chunk = torch.compile(self._logprobs, dynamic=True) if compiled else self._logprobs

    def forward(self, hidden: Tensor, targets: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        """(N, hidden size), (N,) -> (N,) float32 log pi(target) and (N,) float32 entropy in nats."""
        rows = max(1, CHUNK_LOGITS // vocabulary)
        weight, bias = self._linear[0].weight, self._linear[0].bias
        if len(hidden) <= rows:
            return self._chunk(hidden, targets, weight, bias)
        pairs = zip(hidden.split(rows), targets.split(rows), strict=True)
        chunks = [checkpoint(self._chunk, h, t, weight, bias, use_reentrant=False) for h, t in pairs]
        logprobs, entropies = zip(*chunks, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _logprobs(self, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = functional.linear(hidden, weight, bias).float()
        logits = logits.index_fill_(1, to_device(self._banned, logits.device), BANNED_LOGIT)
        if self._temperature != 1.0:
            logits = logits / self._temperature
        normaliser = logits.logsumexp(-1)
        logprobs = logits.gather(1, targets[:, None]).squeeze(1) - normaliser
        with torch.set_grad_enabled(self._entropy_gradient and torch.is_grad_enabled()):
            expected = (torch.exp(logits - normaliser[:, None]) * logits).sum(-1)
            entropy = normaliser - expected
        return logprobs, entropy
