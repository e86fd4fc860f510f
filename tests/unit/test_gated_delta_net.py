"""Guards that Qwen3.5's linear attention is exact over packed rows: every tail goes on from its prompt's end, and knows
nothing of the tails before it.

The yardstick is transformers' own forward pass on one padded row per trajectory. float32; the policy's states decay so
slowly that what leaks, or is forgotten, changes log-probs by more than a thousand times the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet, Qwen3_5TextConfig

from launch.run import memory
from learner import gated_delta_net
from learner.families.generic import PaddedPolicy
from learner.families.packed import PackedPolicy
from learner.families.qwen_vl import FlopCounter, multiply_patches
from learner.gated_delta_net import Branches, PackedGatedDeltaNet, branches
from learner.packing import PieceLengths
from learner.policy import Policy, load_policy
from learner.rows import Piece, Segment, Tail
from perception.config import LearnerConfig, LoraConfig, ModelConfig
from perception.types import Group, PolicySpec
from tests import tiny_families
from tests.builders import sampled_group
from tests.gradients import distance, evaluate, kept_by
from tests.unit.test_exactness import shortened

WHOLE = 1 << 20
Found = tuple[dict[tuple[int, int], torch.Tensor], dict[str, torch.Tensor]]
"""What `evaluate` finds."""


def load(spec: PolicySpec, **learner: Any) -> Policy:
    policy = load_policy(spec, 0.8, LearnerConfig(**learner), lambda handle: handle.ref)
    multiply_patches(policy.model)  # as packed rows do in any family: what is measured is packing
    return policy


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> PolicySpec:
    return tiny_families.build("qwen3_5", tmp_path_factory.mktemp("qwen3_5"))


@pytest.fixture(scope="module")
def packed(spec: PolicySpec) -> Policy:
    policy = load(spec)
    assert isinstance(policy, PackedPolicy)
    return policy


@pytest.fixture(scope="module")
def expected(spec: PolicySpec) -> Callable[[str], Found]:
    """Log-probs and gradient of a case by padded rows."""
    policy = load(spec, rows="padded")
    return cache(lambda name: evaluate(policy, case(name, spec), WHOLE))


def with_prompt(entry: Group, tokens: int) -> Group:
    """The group with no more of its prompt, which has no image, than this."""
    ids = entry.prompt.token_ids[:tokens]
    answers = [replace(t, turns=(replace(t.turns[0], input_ids=ids), *t.turns[1:])) for t in entry.trajectories]
    return replace(entry, prompt=replace(entry.prompt, token_ids=ids), trajectories=tuple(answers))


def case(name: str, spec: PolicySpec) -> list[Group]:
    rng = np.random.default_rng(len(name))

    def make(**kind: Any) -> Group:
        return sampled_group(spec, rng, **({"n": 3} | kind))

    return {
        "lengths that no block holds together": lambda: [
            shortened(make(answer_tokens=150, prompt_tokens=90), (1, 150, 20)),
            make(images=0),
        ],
        "a second image in the answer": lambda: [make(turns=2), make(turns=3, n=2)],
        "one token, and none": lambda: [shortened(make(), (1, 0, 1)), make()],
        "prompts shorter than the convolution": lambda: [with_prompt(make(images=0), n) for n in (1, 2, 3)],
    }[name]()


CASES = (
    ("lengths that no block holds together", WHOLE),
    ("a second image in the answer", WHOLE),
    ("a second image in the answer", 30),  # groups are cut
    ("one token, and none", WHOLE),
    ("prompts shorter than the convolution", WHOLE),
)


def differences(ours: Found, theirs: Found) -> tuple[float, float]:
    """Largest of log-probs, and of the gradient relative to its norm."""
    (mine, my_gradient), (logprobs, gradient) = ours, theirs
    assert mine.keys() == logprobs.keys() and my_gradient.keys() == gradient.keys()
    return max((mine[key] - logprobs[key]).abs().max().item() for key in mine), distance(my_gradient, gradient)


@pytest.mark.parametrize(("name", "budget"), CASES)
def test_packed_equals_padded(
    packed: Policy, expected: Callable[[str], Found], spec: PolicySpec, name: str, budget: int
) -> None:
    logprobs, gradient = differences(evaluate(packed, case(name, spec), budget), expected(name))
    assert logprobs <= 5e-6 and gradient <= 8e-6


def leak(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, hidden_states: Any, attention_mask: Any, **_: Any) -> Any:
        return Qwen3_5GatedDeltaNet.forward(self, hidden_states)

    monkeypatch.setattr(PackedGatedDeltaNet, "forward", forward)


def forget_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    run = PackedGatedDeltaNet._run
    monkeypatch.setattr(PackedGatedDeltaNet, "_run", lambda self, block, inputs, state: run(self, block, inputs, None))


def forget_the_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(lengths: Sequence[PieceLengths], row: int, reach: int) -> Branches:
        made = branches(lengths, row, reach)
        for block in made.tails.values():
            block.tokens[:, :reach] = row
        return made

    monkeypatch.setattr(gated_delta_net, "branches", without)


@pytest.mark.parametrize("mistake", [leak, forget_the_state, forget_the_convolution])
def test_these_groups_tell_a_wrong_branch(
    packed: Policy,
    expected: Callable[[str], Found],
    spec: PolicySpec,
    monkeypatch: pytest.MonkeyPatch,
    mistake: Callable[[Any], None],
) -> None:
    mistake(monkeypatch)
    wrong = evaluate(packed, case("a second image in the answer", spec), WHOLE)
    logprobs, gradient = differences(wrong, expected("a second image in the answer"))
    assert logprobs > 0.05 and gradient > 0.05


@pytest.mark.parametrize(
    "learner",
    [
        {"checkpointing": "on", "freeze_vision": True},
        {"lora": LoraConfig(rank=4, targets=("in_proj_qkv", "in_proj_a", "out_proj", "q_proj"))},
    ],
    ids=["recomputed, with a frozen tower", "adapters"],
)
def test_so_do_the_ways_of_training(spec: PolicySpec, learner: dict[str, Any]) -> None:
    ours, theirs = load(spec, **learner), load(spec, rows="padded", **learner)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    theirs.load_state_dict(ours.state_dict())
    groups = case("one token, and none", spec)
    logprobs, gradient = differences(evaluate(ours, groups, WHOLE), evaluate(theirs, groups, WHOLE))
    assert logprobs <= 5e-6 and gradient <= 8e-6


LENGTHS = st.integers(1, 6) | st.integers(60, 68) | st.integers(120, 140)


@given(
    st.lists(st.tuples(LENGTHS, st.lists(st.just(0) | LENGTHS, max_size=4)), min_size=1, max_size=3), st.integers(0, 5)
)
@settings(max_examples=15)
def test_a_layer_computes_every_part_as_if_it_followed_its_prompt_alone(
    shape: list[tuple[int, list[int]]], padding: int
) -> None:
    torch.manual_seed(0)
    heads = {"linear_num_key_heads": 1, "linear_num_value_heads": 2}
    dims = {"linear_key_head_dim": 4, "linear_value_head_dim": 8}
    layer: Any = Qwen3_5GatedDeltaNet(Qwen3_5TextConfig(hidden_size=8, num_hidden_layers=4, **heads, **dims), 0)
    layer.A_log.data.fill_(-4.0)
    lengths = [PieceLengths(prompt=prompt, tails=tuple(tails)) for prompt, tails in shape]
    row = torch.randn(1, sum(piece.total for piece in lengths) + padding, 8)
    expected, place = [], 0
    for piece in lengths:
        prompt = row[:, place : place + piece.prompt]
        expected.append(layer(prompt))
        place += piece.prompt
        for tail in piece.tails:
            whole = torch.cat([prompt, row[:, place : place + tail]], dim=1)
            expected.append(layer(whole)[:, piece.prompt :])
            place += tail
    assert gated_delta_net.pack_layers(layer) == 3
    out = layer(row, attention_mask=branches(lengths, row.shape[1], 3))
    torch.testing.assert_close(out[:, :place], torch.cat(expected, dim=1), atol=2e-6, rtol=1e-4)


def test_linear_layers_of_another_kind_are_not_packed(
    spec: PolicySpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert gated_delta_net.layers(SimpleNamespace(model_type="another_text", layer_types=["linear_attention"])) == 0
    monkeypatch.setattr(gated_delta_net, "layers", lambda text: 0)
    assert isinstance(load_policy(spec, 1.0, LearnerConfig(), lambda handle: handle.ref), PaddedPolicy)
    assert "rows are padded, not packed: qwen3_5" in caplog.text and "layers that do not" in caplog.text


def test_a_state_costs_arithmetic_and_no_cache(packed: Policy, spec: PolicySpec) -> None:
    def useful(prompt: int) -> float:
        segment = Segment(ids=torch.zeros(prompt, dtype=torch.int64), positions=torch.zeros(3, prompt))
        return FlopCounter(packed.model, True, False)([Piece(prompt=segment, tails=(Tail(0, 0, 1.0),))])

    # Weights: mlp 3 x 64 x 128 in four layers; qkv 64 x 512 and its 512 kernels of 4, z 64 x 256, a and b 64 x 2,
    # out 256 x 64 in three; q with its gate 64 x 128, k and v 64 x 32, o 64 x 64 in one. States: 2 of 128 x 128.
    weights = 4 * 3 * 64 * 128 + 3 * (64 * 512 + 512 * 4 + 64 * 256 + 2 * 64 * 2 + 256 * 64) + 64 * (128 + 2 * 32 + 64)
    one, two = useful(1), useful(2)
    assert one == 3 * (2 * weights + 3 * 6 * 2 * 128 * 128 + 4 * 2 * 32)
    assert two - 2 * one == 3 * 4 * 2 * 32  # of three pairs, two are paid: one layer of two heads
    size = memory.measure(ModelConfig(path=spec.path, segmenter=""), LearnerConfig())
    assert size.key_value == 2 * 32
    assert size.parameters == sum(parameter.numel() for parameter in packed.model.parameters())


def test_activations_are_about_what_the_memory_model_says(packed: Policy) -> None:
    layer = packed.model.model.language_model.layers[0]
    lengths, row = [PieceLengths(prompt=128, tails=(64, 64))], torch.randn(1, 256, 64, requires_grad=True)
    with kept_by(layer) as kept:
        layer(row, None, attention_mask=branches(lengths, 256, 3))
    numbers = sum(kept.values()) / 4
    assert numbers / 256 == pytest.approx(memory.KEPT * memory._layers([layer]).width, rel=0.3)
