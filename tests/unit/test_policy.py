"""Guards what the learner computes of a policy: exactly what the engine sampled from, at a fraction of the naive cost.

The reference everywhere is transformers' own forward pass, one unpadded row at a time with its own copy of every image.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

import learner.head
from learner.families.generic import PaddedPolicy
from learner.policy import Policy, load_policy
from learner.rows import bins, pieces
from perception.config import LearnerConfig, LoraConfig
from perception.errors import UserError
from perception.types import INFRASTRUCTURE, FailureKind, Group, PolicySpec, Trajectory
from tests import tiny_families, tiny_policy
from tests.builders import failure, sampled_group

TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> PolicySpec:
    return tiny_policy.build(tmp_path_factory.mktemp("policy"))


def load(spec: PolicySpec, **settings: object) -> Policy:
    return load_policy(spec, TEMPERATURE, LearnerConfig(**settings), lambda handle: handle.ref)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def policy(spec: PolicySpec) -> Policy:
    return load(spec)


@pytest.fixture(scope="module")
def stock(spec: PolicySpec) -> Policy:
    return load(spec, rows="padded")


@pytest.fixture(scope="module")
def groups(spec: PolicySpec) -> list[Group]:
    """One image, no image, two images in a prompt, a second image in a second turn; one answer holds an image id."""
    rng = np.random.default_rng(0)
    made = [
        sampled_group(spec, rng, n=3),
        sampled_group(spec, rng, n=2, images=0),
        sampled_group(spec, rng, n=2, images=2, side=61),
        sampled_group(spec, rng, n=3, turns=2, side=112),
    ]
    hostile = made[0].trajectories[0]
    turn = replace(hostile.turns[0], token_ids=(7, spec.banned_token_ids[0], 9), logprobs=(-5.0, -5.0, -5.0))
    made[0] = replace(made[0], trajectories=(replace(hostile, turns=(turn,)), *made[0].trajectories[1:]))
    return made


def naive_logprobs(policy: Policy, spec: PolicySpec, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) of a trajectory's sampled tokens by a plain forward pass."""
    processor = AutoImageProcessor.from_pretrained(spec.path, backend="torchvision")
    ids: list[int] = []
    kinds: list[int] = []
    predictors: list[int] = []
    pixels, grids = [], []
    for turn in trajectory.turns:
        images = iter(turn.images)
        for token in turn.input_ids:
            repeat = 1
            if token == spec.image_token_id:
                inputs = processor(images=Image.open(io.BytesIO(next(images).ref)).convert("RGB"), return_tensors="pt")
                pixels.append(inputs["pixel_values"])
                grids.append(inputs["image_grid_thw"])
                repeat = int(grids[-1].prod()) // 4
            ids += [token] * repeat
            kinds += [int(token == spec.image_token_id)] * repeat
        predictors += range(len(ids) - 1, len(ids) - 1 + len(turn.token_ids))
        ids += turn.token_ids
        kinds += [0] * len(turn.token_ids)
    positions, _ = policy.model.model.get_rope_index(
        torch.tensor([ids]), torch.tensor([kinds]), image_grid_thw=torch.cat(grids) if grids else None
    )
    embeddings = policy.model.get_input_embeddings()(torch.tensor(ids))
    if grids:
        features = torch.cat(policy.model.get_image_features(torch.cat(pixels), torch.cat(grids)).pooler_output)
        embeddings = embeddings.index_put((torch.tensor(kinds).nonzero().flatten(),), features)
    logits = policy.model(inputs_embeds=embeddings[None], position_ids=positions).logits[0, predictors]
    logits[:, list(spec.banned_token_ids)] = -torch.inf
    table = torch.log_softmax(logits / TEMPERATURE, dim=-1)
    sampled = torch.tensor([token for turn in trajectory.turns for token in turn.token_ids])
    entropy = -(table.exp() * table.masked_fill(table == -torch.inf, 0.0)).sum(-1)
    return table.gather(1, sampled[:, None]).squeeze(1), entropy


def gradients(policy: Policy) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad(set_to_none=True)
    return found


def batched(policy: Policy, groups: Sequence[Group], budget: int = 1 << 20) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) in the order of the micro-batches; adds the gradient of sum(advantage * log-prob)."""
    logprobs, entropies = [], []
    for work in bins(list(pieces(groups, policy.layout, budget)), budget):
        batch = policy.collate(work)
        values, entropy = policy(batch)
        (values.clamp(min=-1e3) * batch.tokens.advantages).sum().backward()
        logprobs.append(values.detach())
        entropies.append(entropy.detach())
    return torch.cat(logprobs), torch.cat(entropies)


def in_order(groups: Sequence[Group], policy: Policy, budget: int = 1 << 20) -> list[tuple[Group, Trajectory]]:
    """The trajectories in the order of the micro-batches."""
    tails = [t for work in bins(list(pieces(groups, policy.layout, budget)), budget) for p in work for t in p.tails]
    return [(groups[t.group], groups[t.group].trajectories[t.trajectory]) for t in tails]


@pytest.mark.parametrize("budget", [150, 1 << 20])
@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_logprobs_and_entropy_equal_a_plain_forward_pass(
    spec: PolicySpec, stock: Policy, groups: list[Group], rows: str, budget: int
) -> None:
    policy = load(spec, rows=rows)
    # transformers' own forward pass cannot take a placeholder that was sampled; the packed one can.
    groups = groups if rows == "packed" else groups[1:]
    logprobs, entropy = batched(policy, groups, budget)
    with torch.no_grad():
        plain = [naive_logprobs(stock, spec, trajectory) for _, trajectory in in_order(groups, policy, budget)]
    expected = torch.cat([value for value, _ in plain])
    possible = expected > -torch.inf
    assert (logprobs - expected)[possible].abs().max() < 1e-5
    assert (logprobs[~possible] < -1e8).all()
    assert (entropy - torch.cat([value for _, value in plain])).abs().max() < 1e-5
    assert len(logprobs) == sum(t.sampled_tokens for entry in groups for t in entry.trajectories)


def test_shared_prompts_give_the_gradient_of_naive_rows(
    policy: Policy, stock: Policy, spec: PolicySpec, groups: list[Group]
) -> None:
    batched(policy, groups)
    shared = gradients(policy)
    for entry in groups:
        for one in entry.trajectories:
            (naive_logprobs(stock, spec, one)[0].clamp(min=-1e3) * one.advantage).sum().backward()
    naive = gradients(stock)
    assert shared.keys() == naive.keys()
    for name, gradient in naive.items():
        assert (shared[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_a_family_that_packing_does_not_know_gets_padded_rows_and_a_warning(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """Gemma 3: an image's tokens see one another, and half of the layers see 8 tokens back."""
    spec = tiny_families.build("gemma3", tmp_path_factory.mktemp("gemma3"))
    rng = np.random.default_rng(4)
    groups = [sampled_group(spec, rng, n=3), sampled_group(spec, rng, n=2, turns=2), sampled_group(spec, rng, images=0)]
    policy = load(spec)
    assert isinstance(policy, PaddedPolicy)
    (record,) = caplog.records
    assert "rows are padded, not packed: gemma3" in record.getMessage()
    together, _ = batched(policy, groups)
    whole = gradients(policy)
    alone = torch.cat([batched(policy, [one])[0] for one in singles(groups, policy)])
    assert (together - alone).abs().max() < 2e-6
    single = gradients(policy)
    assert all((whole[name] - g).norm() <= 1e-4 * g.norm() + 1e-6 for name, g in single.items())
    # 4 tokens between two marks and two empty lines for one placeholder.
    assert len(next(pieces(groups, policy.layout, 1 << 20)).prompt.ids) == len(groups[0].prompt.token_ids) + 7


def singles(groups: Sequence[Group], policy: Policy) -> list[Group]:
    """Every trajectory as a group of its own, in the order of the micro-batches."""
    return [replace(entry, trajectories=(one,)) for entry, one in in_order(groups, policy)]


def test_the_head_in_chunks_is_the_head_in_one_piece(
    policy: Policy, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    logprobs, entropy = batched(policy, groups)
    whole = gradients(policy)
    monkeypatch.setattr(learner.head, "CHUNK_LOGITS", 5 * policy.vocabulary)
    chunked_logprobs, chunked_entropy = batched(policy, groups)
    assert torch.allclose(chunked_logprobs, logprobs, atol=1e-6)
    assert torch.allclose(chunked_entropy, entropy, atol=1e-6)
    for name, gradient in gradients(policy).items():
        assert (whole[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_the_entropys_gradient_is_that_of_the_textbook(stock: Policy, spec: PolicySpec, groups: list[Group]) -> None:
    policy = load_policy(spec, TEMPERATURE, LearnerConfig(), lambda handle: handle.ref, entropy_gradient=True)
    batch = policy.collate(list(pieces(groups[1:2], policy.layout, 1 << 20)))
    policy(batch)[1].sum().backward()
    ours = gradients(policy)
    torch.cat([naive_logprobs(stock, spec, t)[1] for _, t in in_order(groups[1:2], policy)]).sum().backward()
    for name, gradient in gradients(stock).items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("kind", sorted(INFRASTRUCTURE))
def test_what_engine_or_reward_worker_failed_takes_no_part(
    policy: Policy, groups: list[Group], kind: FailureKind
) -> None:
    """Neither whole groups nor single trajectories: log-probs, gradient and the tokens counted are those without them.
    An answer that only failed to parse stays."""

    def failed(one: Trajectory, kind: FailureKind = kind) -> Trajectory:
        return replace(one, failure=failure(kind), advantage=5.0)

    first, second, third, fourth = groups
    mixed = [
        replace(first, trajectories=(first.trajectories[0], *map(failed, first.trajectories[1:]))),
        replace(second, trajectories=tuple(map(failed, second.trajectories))),
        replace(third, trajectories=tuple(failed(one, FailureKind.UNPARSED) for one in third.trajectories)),
        fourth,
    ]
    without = [
        replace(first, trajectories=first.trajectories[:1]),
        replace(third, trajectories=tuple(replace(one, advantage=5.0) for one in third.trajectories)),
        fourth,
    ]
    ours = batched(policy, mixed)[0]
    gradient = gradients(policy)
    theirs = batched(policy, without)[0]
    assert torch.equal(ours, theirs)
    assert all(torch.equal(gradient[name], other) for name, other in gradients(policy).items())


def test_an_image_is_prepared_once_per_step(policy: Policy, groups: list[Group]) -> None:
    prepared: list[str] = []
    layout = policy.layout
    counting = replace(layout, picture=lambda handle: (prepared.append(handle.key), layout.picture(handle))[1])
    list(pieces([*groups, *groups], counting, 100))
    distinct = {h.key for e in groups for t in e.trajectories for turn in t.turns for h in turn.images}
    assert sorted(prepared) == sorted(distinct)


def test_a_rank_without_work_runs_the_same_modules_and_counts_nowhere(policy: Policy, spec: PolicySpec) -> None:
    for one in (policy, load(spec, rows="padded")):
        batch = one.collate([])
        assert batch.tokens.loss_mask.sum() == 0
        logprobs, _ = one(batch)
        assert torch.isfinite(logprobs).all()
        (logprobs * batch.tokens.loss_mask).sum().backward()
        assert all(not gradient.any() for gradient in gradients(one).values())
    ran: set[str] = set()
    tower = policy.model.model.visual
    handle = tower.register_forward_hook(lambda *_: ran.add("vision"))
    policy(policy.collate([]))
    handle.remove()
    assert ran == {"vision"}


def test_features_of_a_frozen_vision_tower_are_computed_once_and_change_nothing(
    policy: Policy, spec: PolicySpec, groups: list[Group]
) -> None:
    expected = batched(policy, groups)[0]
    whole = gradients(policy)
    frozen = load(spec, freeze_vision=True)
    computed: list[int] = []
    frozen.model.model.visual.register_forward_hook(lambda *call: computed.append(len(call[1][0])))
    first = batched(frozen, groups)[0]
    patches = sum(computed)
    again = batched(frozen, groups)[0]
    assert torch.equal(first, again) and (first - expected).abs().max() < 1e-6
    assert sum(computed) == patches > 0
    assert frozen.images == 2 * frozen.images_known > 0
    found = gradients(frozen)
    assert not any("visual" in name for name in found)
    for name, gradient in whole.items():
        if "visual" not in name:
            assert (found[name] / 2 - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_features_are_only_kept_as_long_as_there_is_room(spec: PolicySpec, groups: list[Group]) -> None:
    frozen = load(spec, freeze_vision=True, feature_cache_mb=0)
    assert torch.equal(batched(frozen, groups)[0], batched(frozen, groups)[0])
    assert frozen.images_known == 0


@pytest.mark.parametrize("which", ["selective", "on"])
def test_recomputed_layers_change_no_gradient(
    policy: Policy, spec: PolicySpec, groups: list[Group], which: str
) -> None:
    batched(policy, groups)
    expected = gradients(policy)
    recomputing = load(spec, checkpointing=which)
    layers = [m for m in recomputing.modules() if getattr(m, "gradient_checkpointing", None) is not None]
    calls: list[str] = []
    for layer in recomputing.model.model.language_model.layers:
        layer.input_layernorm.register_forward_pre_hook(lambda *_: calls.append("text"))
    batched(recomputing, groups)
    assert layers and len(calls) == {"selective": 3, "on": 4}[which]  # two layers; a recomputed one runs twice
    for name, gradient in gradients(recomputing).items():
        assert torch.allclose(gradient, expected[name], atol=1e-6), name


def test_adapters_begin_as_the_policy_itself_and_only_they_are_trained(
    policy: Policy, spec: PolicySpec, groups: list[Group]
) -> None:
    adapted = load(spec, lora=LoraConfig(rank=4))
    start = batched(adapted, groups)[0]
    assert (start - batched(policy, groups)[0]).abs().max() < 1e-6
    found = gradients(adapted)
    assert found and all("lora_" in name for name in found)
    assert all("visual" not in name for name in found)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    with torch.no_grad():
        assert (batched_forward(adapted, groups) - start).abs().max() > 1e-3
        adapted.use_adapters(False)
        assert (batched_forward(adapted, groups) - start).abs().max() < 1e-6
        adapted.use_adapters(True)
    assert all(p.requires_grad == ("lora_" in name) for name, p in adapted.named_parameters())


def batched_forward(policy: Policy, groups: Sequence[Group]) -> Tensor:
    return torch.cat(
        [policy(policy.collate(w))[0] for w in bins(list(pieces(groups, policy.layout, 1 << 20)), 1 << 20)]
    )


def test_adapters_that_fit_nowhere_are_refused(spec: PolicySpec) -> None:
    with pytest.raises(UserError, match="no_such_proj"):
        load(spec, lora=LoraConfig(rank=4, targets=("no_such_proj",)))


def test_placeholders_without_an_image_are_refused_by_name(policy: Policy, groups: list[Group]) -> None:
    group = groups[0]
    broken = replace(group, prompt=replace(group.prompt, images=()))
    with pytest.raises(ValueError, match=f"sample {group.prompt.sample.id}: 1 image placeholders for 0"):
        list(pieces([broken], policy.layout, 100))


def test_a_trajectory_that_begins_elsewhere_is_refused_by_name(policy: Policy, groups: list[Group]) -> None:
    first, second = groups[0], groups[1]
    entry = replace(first, trajectories=second.trajectories)
    with pytest.raises(ValueError, match=f"sample {first.prompt.sample.id}: trajectory 0 does not begin"):
        list(pieces([entry], policy.layout, 100))
