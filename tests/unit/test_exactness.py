"""Guards that packing is exact: log-probs and gradients of one packed row are those of one padded row per trajectory.

The yardstick is transformers' own forward pass, each row with its own copy of its images (`PaddedPolicy`), itself held
against single rows without padding in `test_policy`. Packed rows embed patches by a matrix product, which adds in
another order than the convolution it replaces: the yardstick is given it too, so that what is measured is packing, and
one test measures the replacement. float32 unless a test says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.run.parity import LIMITS
from learner.families.generic import PaddedPolicy
from learner.families.packed import PackedPolicy
from learner.families.qwen_vl import QwenPolicy, multiply_patches
from learner.policy import Policy, load_policy
from perception.config import LearnerConfig, LoraConfig
from perception.types import Group, PolicySpec, Trajectory
from tests import tiny_families
from tests.builders import sampled_group, with_advantages
from tests.gradients import distance, evaluate

TEMPERATURE = 0.8
FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
OTHERS = ("llava", "llava_onevision", "internvl", "idefics3", "mistral3", "pixtral")
ADAPTERS = {"lora": LoraConfig(rank=2)}
SOME_FROZEN = (("llava_onevision", {"freeze_vision": True}), ("idefics3", ADAPTERS), ("qwen3_vl", ADAPTERS))


def load(spec: PolicySpec, rows: str, **settings: Any) -> Policy:
    config = LearnerConfig(rows=rows, **settings)  # type: ignore[arg-type]
    return load_policy(spec, TEMPERATURE, config, lambda handle: handle.ref)


@pytest.fixture(scope="module", params=FAMILIES)
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PolicySpec:
    return tiny_families.build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def packed(spec: PolicySpec) -> Policy:
    policy = load(spec, "packed")
    assert isinstance(policy, QwenPolicy)
    return policy


@pytest.fixture(scope="module")
def padded(spec: PolicySpec) -> Policy:
    policy = load(spec, "padded")
    assert isinstance(policy, PaddedPolicy)
    multiply_patches(policy.model)
    return policy


def shortened(entry: Group, lengths: Sequence[int]) -> Group:
    """The group with its answers cut to these lengths; 0: the engine returned no token."""

    def cut(trajectory: Trajectory, length: int) -> Trajectory:
        turn = trajectory.turns[0]
        one = replace(turn, token_ids=turn.token_ids[:length], logprobs=turn.logprobs[:length])
        return replace(trajectory, turns=(one,) if length else ())

    done = tuple(cut(t, n) for t, n in zip(entry.trajectories, lengths, strict=True))
    return replace(entry, trajectories=done)


def case(name: str, spec: PolicySpec) -> list[Group]:
    rng = np.random.default_rng(sum(map(ord, name)))
    make = lambda **kind: sampled_group(spec, rng, **({"n": 4} | kind))  # noqa: E731
    # 112 px are one attention window of Qwen2.5-VL, 196 px one and three quarters in either direction.
    return {
        "unequal lengths": lambda: [make(answer_tokens=40)],
        "no image": lambda: [make(images=0)],
        "several images": lambda: [make(images=3, side=84)],
        "windows cut by the border": lambda: [make(side=196)],
        "images of different sizes": lambda: [make(side=56), make(side=168), make(side=84, images=2)],
        "a second image of one sample": lambda: [make(turns=2), make(turns=3, n=2)],
        "one-token answers": lambda: [shortened(make(answer_tokens=9), (1, 1, 1, 1)), make()],
        "empty answers": lambda: [shortened(make(), (0, 1, 0, 1)), make(images=0)],
        "one prompt in two groups": lambda: [entry := make(), with_advantages(entry, (1.0, -1.0, 0.5, 2.0))],
    }[name]()


CASES = (
    "unequal lengths",
    "no image",
    "several images",
    "windows cut by the border",
    "images of different sizes",
    "a second image of one sample",
    "one-token answers",
    "empty answers",
    "one prompt in two groups",
)


@pytest.mark.parametrize("name", CASES)
def test_packed_equals_padded(packed: Policy, padded: Policy, spec: PolicySpec, name: str) -> None:
    """In one row, and in rows of at most 100 tokens."""
    groups = case(name, spec)
    theirs, their_gradient = evaluate(padded, groups, 1 << 20)
    expected = {(i, j) for i, e in enumerate(groups) for j, t in enumerate(e.trajectories) if t.sampled_tokens}
    for budget in (1 << 20, 100):
        ours, our_gradient = evaluate(packed, groups, budget)
        assert ours.keys() == theirs.keys() == expected
        assert max((ours[key] - theirs[key]).abs().max().item() for key in expected) <= 2e-6
        assert distance(our_gradient, their_gradient) <= 1e-6


def test_patches_by_a_matrix_product_are_those_by_convolution(padded: Policy, spec: PolicySpec) -> None:
    groups = case("images of different sizes", spec) + case("a second image of one sample", spec)
    ours, our_gradient = evaluate(padded, groups, 1 << 20)
    stock, stock_gradient = evaluate(load(spec, "padded"), groups, 1 << 20)
    assert max((ours[key] - stock[key]).abs().max().item() for key in stock) <= 1e-5
    assert distance(our_gradient, stock_gradient) <= 1e-5


@pytest.mark.parametrize(("name", "settings"), [*((name, {}) for name in OTHERS), *SOME_FROZEN])
def test_packed_rows_of_other_families_equal_padded_ones(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Images of several tiles, with marks and line ends; frozen ones' features are known the second time."""
    spec = tiny_families.build(name, tmp_path)
    groups = case("images of different sizes", spec)[1:] + case("a second image of one sample", spec)[1:]
    groups += case("empty answers", spec)
    ours, theirs = load(spec, "packed", **settings), load(spec, "padded", **settings)
    assert isinstance(ours, PackedPolicy) and isinstance(theirs, PaddedPolicy)
    if name == "qwen3_vl":
        multiply_patches(theirs.model)
    theirs.load_state_dict(ours.state_dict())  # adapters begin at random
    expected, gradient = evaluate(theirs, groups, 1 << 20)
    for budget in (1 << 20, 100):
        found, own = evaluate(ours, groups, budget)
        assert max((found[key] - expected[key]).abs().max().item() for key in expected) <= 4e-6
        assert own.keys() == gradient.keys() and distance(own, gradient) <= 2e-6
    assert (ours.images_known > 0) == ("lora" in settings)  # a frozen tower's projector is trained


def test_in_double_precision_nothing_is_left_of_the_difference(
    packed: Policy, padded: Policy, spec: PolicySpec
) -> None:
    groups = case("a second image of one sample", spec) + case("windows cut by the border", spec)
    gradients = []
    try:
        for policy in (packed, padded):
            policy.double()
            gradients.append(evaluate(policy, groups, 1 << 20)[1])
    finally:
        packed.float(), padded.float()
    assert distance(*gradients) < 1e-7  # what is left is float32: rotary angles and the head's softmax


def test_in_bfloat16_they_differ_by_less_than_the_parity_gate_allows_and_other_weights_by_more(
    spec: PolicySpec,
) -> None:
    half, rng = replace(spec, dtype="bfloat16"), np.random.default_rng(3)
    groups = [sampled_group(spec, rng, answer_tokens=40) for _ in range(4)]
    ours, theirs = load(half, "packed"), load(half, "padded")

    def mismatch() -> float:
        one, other = (evaluate(policy, groups, 2048)[0] for policy in (ours, theirs))
        return float(torch.cat([(one[place] - other[place]).abs() for place in one]).mean())

    assert 1e-5 < mismatch() < LIMITS["bfloat16"] / 2
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1.2)
    assert mismatch() > LIMITS["bfloat16"]
