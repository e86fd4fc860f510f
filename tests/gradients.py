"""What a policy makes of groups, to compare ways of computing it, and what its backward pass keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from learner.policy import Policy
from learner.rows import bins, pieces
from learner.transfer import to_device
from perception.types import Group


def evaluate(
    policy: Policy, groups: Sequence[Group], budget: int
) -> tuple[dict[tuple[int, int], Tensor], dict[str, Tensor]]:
    """Log-probs by (group, trajectory), and the gradient of sum over tokens of advantage * log-prob."""
    found: dict[tuple[int, int], Tensor] = {}
    for work in bins(list(pieces(groups, policy.layout, budget)), budget):
        batch = to_device(policy.collate(work), policy.model.device)
        logprobs, _ = policy(batch)
        (logprobs * batch.tokens.advantages).sum().backward()
        tails = [tail for piece in work for tail in piece.tails]
        parts = logprobs.detach().split([len(tail.targets) for tail in tails])
        found |= {(tail.group, tail.trajectory): part for tail, part in zip(tails, parts, strict=True)}
    gradient = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.zero_grad(set_to_none=True)
    return found, gradient


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference of two gradients over the second one's norm."""
    zero = torch.zeros(())
    squares = sum((one.get(name, zero) - value).square().sum().double() for name, value in other.items())
    return float((squares / sum(value.square().sum().double() for value in other.values())) ** 0.5)


@contextmanager
def kept_by(module: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of every storage that the backward pass will read, parameters left out."""
    own, found, alive = {p.untyped_storage().data_ptr() for p in module.parameters()}, {}, []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # else its address is given away again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found
