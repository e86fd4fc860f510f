"""Guards that the host never waits for the device within a micro-batch, in which it has all of the GPU's work to queue.

A wait is a value that the host reads back, a shape that depends on values, or a copy that is not asynchronous. On the
CPU a dispatch mode refuses them. The `meta` device stands in for CUDA: the code goes the same way, and nothing can be
read at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from learner import text_attention
from learner.loss import policy_loss, token_sums
from learner.packing import PackedBatch
from learner.policy import Policy, load_policy
from learner.rows import pieces, token_batch
from learner.transfer import to_device
from perception.config import AlgorithmConfig, LearnerConfig, LoraConfig
from perception.types import PolicySpec
from tests import tiny_families
from tests.builders import sampled_group

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.nonzero,
    aten.masked_select,
    aten.unique_consecutive,
    aten._unique2,
    aten.unique_dim,
    aten.bincount,
    aten.repeat_interleave,
    aten.equal,
}
COPIES = {aten._to_copy, aten.copy_}
SIZE: Any = {"steps": 1, "prompts_per_step": 2, "group_size": 2}
ALGORITHMS = [
    AlgorithmConfig(loss="gspo", aggregate="sequence", **SIZE),
    AlgorithmConfig(importance="sequence", kl_coef=0.1, entropy_coef=0.1, **SIZE),
]


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        masks = packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        asynchronous = (kwargs or {}).get("non_blocking") or (packet is aten.copy_ and len(args) > 2 and args[2])
        moves = packet in COPIES and result.device != args[packet is aten.copy_].device and not asynchronous
        if packet in READS or masks or moves:
            raise AssertionError(f"the host waits for the device: {func}")
        return result


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PolicySpec:
    return tiny_families.build(request.param, tmp_path_factory.mktemp(request.param))


def load(spec: PolicySpec, **settings: Any) -> Policy:
    return load_policy(spec, 0.8, LearnerConfig(**settings), lambda handle: handle.ref)


def micro_batch(policy: Policy, spec: PolicySpec) -> PackedBatch:
    """Images of several sizes, with windows that the border cuts, one of them fed in a second turn."""
    rng = np.random.default_rng(0)
    groups = [sampled_group(spec, rng, n=2, images=2, side=196), sampled_group(spec, rng, n=2, turns=2, side=112)]
    batch = policy.collate(list(pieces(groups, policy.layout, 1 << 20)))
    assert isinstance(batch, PackedBatch) and len(batch.pictures) > 3
    return batch


def learn(policy: Policy, batch: PackedBatch, algorithm: AlgorithmConfig) -> dict[str, Tensor]:
    """What a learner rank does with a micro-batch (`Stepper`), DeepSpeed left out."""
    batch = to_device(batch, policy.model.device)
    tokens = replace(batch.tokens, reference_logprobs=batch.tokens.rollout_logprobs)
    logprobs, entropy = policy(batch)
    policy_loss(logprobs, entropy, tokens, algorithm).backward()
    return token_sums(logprobs.detach(), entropy.detach(), tokens, algorithm)


@pytest.mark.parametrize("settings", [{"freeze_vision": True}, {"checkpointing": "on"}], ids=str)
def test_on_the_cpu_no_value_is_read(spec: PolicySpec, settings: dict[str, Any]) -> None:
    policy = load(spec, **settings)
    batch = micro_batch(policy, spec)
    learn(policy, batch, ALGORITHMS[0])
    for algorithm in ALGORITHMS:
        with NoWaiting():
            sums = learn(policy, batch, algorithm)
        assert all(torch.isfinite(value) for value in sums.values())


@pytest.mark.parametrize("settings", [{}, {"freeze_vision": True}, {"lora": LoraConfig(rank=2)}], ids=str)
def test_on_a_device_that_cannot_be_read_a_micro_batch_runs_through(
    spec: PolicySpec, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16, so that the tower takes the kernel with windows of any length; of FlexAttention only the shapes."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, *, block_mask: object, scale: float, enable_gqa: bool) -> Tensor:
        return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=enable_gqa)

    monkeypatch.setattr(text_attention, "_fused", lambda: kernel)
    policy = load(replace(spec, dtype="bfloat16"), **settings)
    batch = micro_batch(policy, spec)
    assert all(picture.inputs["pixel_values"].dtype == torch.bfloat16 for picture in batch.pictures)
    learn(policy, batch, ALGORITHMS[0])
    policy.zero_grad(set_to_none=True)
    policy.to("meta")
    with NoWaiting():
        sums = learn(policy, batch, ALGORITHMS[0])
    assert {value.device.type for value in sums.values()} == {"meta"}
    assert all(p.grad is not None for name, p in policy.named_parameters() if p.requires_grad and "lm_head" not in name)


def test_copies_to_cuda_are_made_from_pinned_memory_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []
    copies: list[tuple[int, torch.device, bool]] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: (pinned.append(id(x)), x)[1])
    monkeypatch.setattr(Tensor, "to", lambda x, to, non_blocking: (copies.append((id(x), to, non_blocking)), x)[1])
    batch, cuda = token_batch([]), torch.device("cuda")
    to_device({"tokens": batch, "name": "x"}, cuda)
    tensors = [batch.rollout_logprobs, batch.advantages, batch.loss_mask, batch.sequence]
    assert pinned == [id(x) for x in tensors] and copies == [(id(x), cuda, True) for x in tensors]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: torch.unique_consecutive(x),
        lambda x: x.repeat_interleave(torch.ones(len(x), dtype=torch.int64)),
        lambda x: x.to("meta"),
        lambda x: torch.zeros(3, device="meta").copy_(x),
    ],
)
def test_the_mode_itself_finds_a_wait(wait: Callable[[Tensor], object]) -> None:
    with NoWaiting(), pytest.raises(AssertionError, match="the host waits"):
        wait(torch.ones(3))
