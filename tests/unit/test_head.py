"""Guards the memory of the vocabulary head; test_policy.py guards its values."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import learner.head


def test_the_heads_memory_does_not_grow_with_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that autograd keeps for the backward pass, and the largest tensor of logits: the same for 8x the tokens."""
    vocabulary, width = 4096, 8
    monkeypatch.setattr(learner.head, "CHUNK_LOGITS", 32 * vocabulary)
    product, largest = functional.linear, []

    def linear(*inputs: torch.Tensor) -> torch.Tensor:
        logits = product(*inputs)
        largest.append(logits.numel())
        return logits

    monkeypatch.setattr(functional, "linear", linear)
    weights = torch.nn.Linear(width, vocabulary)
    head = learner.head.VocabularyHead(weights, torch.tensor([0]), 1.0, entropy_gradient=False, compiled=False)

    def kept(tokens: int) -> int:
        saved: dict[int, int] = {}  # the weight, once
        hidden = torch.randn(tokens, width, requires_grad=True)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            logprobs, _ = head(hidden, torch.zeros(tokens, dtype=torch.int64), vocabulary)
        logprobs.sum().backward()
        assert hidden.grad is not None and hidden.grad.abs().sum() > 0
        return sum(saved.values())

    small, large = kept(64), kept(512)
    assert max(largest) == 32 * vocabulary
    assert large < 512 * vocabulary  # bytes: a quarter of a byte for each of the logits
    assert large <= 8 * small
