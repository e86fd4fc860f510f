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

import learner.policy
from learner.batch import Layout, micro_batches
from learner.policy import Policy, make_layout
from perception.types import Group, PolicySpec, TrainGroup, Trajectory
from tests import tiny_policy
from tests.train_groups import train_group

TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> PolicySpec:
    return tiny_policy.build(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def policy(spec: PolicySpec) -> Policy:
    return Policy(spec, TEMPERATURE)


@pytest.fixture(scope="module")
def layout(policy: Policy, spec: PolicySpec) -> Layout:
    return make_layout(policy, spec, lambda ref: ref)


@pytest.fixture(scope="module")
def groups(spec: PolicySpec) -> list[TrainGroup]:
    """One image, no image, two images in a prompt, a second image in a second turn; one answer holds an image id."""
    rng = np.random.default_rng(0)
    made = [
        train_group(spec, rng, n=3),
        train_group(spec, rng, n=2, images=0),
        train_group(spec, rng, n=2, images=2, side=61),
        train_group(spec, rng, n=3, turns=2, side=112),
    ]
    hostile = made[0].group.trajectories[0]
    turn = replace(hostile.turns[0], token_ids=(7, spec.banned_token_ids[0], 9), logprobs=(-5.0, -5.0, -5.0))
    trajectories = (replace(hostile, turns=(turn,)), *made[0].group.trajectories[1:])
    made[0] = replace(made[0], group=replace(made[0].group, trajectories=trajectories))
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


def batched(policy: Policy, layout: Layout, groups: Sequence[TrainGroup], size: int) -> Tensor:
    """Sum over tokens of advantage * log-prob, differentiated micro-batch by micro-batch."""
    total = torch.zeros(())
    for _, batch in micro_batches(groups, size, layout):
        value = (policy(batch)[0].clamp(min=-1e3) * batch.tokens.advantages).sum()
        value.backward()
        total += value.detach()
    return total


@pytest.mark.parametrize("size", [1, 4])
def test_logprobs_and_entropy_equal_a_plain_forward_pass(
    policy: Policy, spec: PolicySpec, layout: Layout, groups: list[TrainGroup], size: int
) -> None:
    seen = 0
    for indices, batch in micro_batches(groups, size, layout):
        with torch.no_grad():
            logprobs, entropy = policy(batch)
            plain = [naive_logprobs(policy, spec, t) for i in indices for t in groups[i].group.trajectories]
        expected = torch.cat([value for value, _ in plain])
        possible = expected > -torch.inf
        assert (logprobs - expected)[possible].abs().max() < 1e-5
        assert (logprobs[~possible] < -1e8).all()
        assert (entropy - torch.cat([value for _, value in plain])).abs().max() < 1e-5
        seen += len(logprobs)
    assert seen == sum(t.sampled_tokens for entry in groups for t in entry.group.trajectories)


def test_shared_image_features_give_the_gradient_of_naive_rows(
    policy: Policy, spec: PolicySpec, layout: Layout, groups: list[TrainGroup]
) -> None:
    batched(policy, layout, groups, size=2)
    shared = gradients(policy)
    for entry in groups:
        for trajectory, advantage in zip(entry.group.trajectories, entry.advantages, strict=True):
            (naive_logprobs(policy, spec, trajectory)[0].clamp(min=-1e3) * advantage).sum().backward()
    naive = gradients(policy)
    assert shared.keys() == naive.keys()
    for name, gradient in naive.items():
        assert (shared[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_the_cut_into_micro_batches_changes_nothing(policy: Policy, layout: Layout, groups: list[TrainGroup]) -> None:
    whole = batched(policy, layout, groups, size=len(groups))
    of_whole = gradients(policy)
    pieces = batched(policy, layout, groups, size=1)
    of_pieces = gradients(policy)
    assert pieces.item() == pytest.approx(whole.item(), rel=1e-5)
    for name, gradient in of_whole.items():
        assert (of_pieces[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_the_head_in_chunks_is_the_head_in_one_piece(
    policy: Policy, layout: Layout, groups: list[TrainGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    ((_, batch),) = micro_batches(groups, len(groups), layout)

    def outcome() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        logprobs, entropy = policy(batch)
        (logprobs.clamp(min=-1e3) * batch.tokens.advantages).sum().backward()
        return logprobs.detach(), entropy, gradients(policy)

    logprobs, entropy, whole = outcome()
    monkeypatch.setattr(learner.policy, "HEAD_ELEMENTS", 5 * policy.model.config.text_config.vocab_size)
    chunked_logprobs, chunked_entropy, chunked = outcome()
    assert torch.allclose(chunked_logprobs, logprobs, atol=1e-6)
    assert torch.allclose(chunked_entropy, entropy, atol=1e-6)
    for name, gradient in whole.items():
        assert (chunked[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_an_image_is_prepared_once_per_step(layout: Layout, groups: list[TrainGroup]) -> None:
    prepared: list[str] = []
    counting = replace(layout, pixels=lambda handle: (prepared.append(handle.key), layout.pixels(handle))[1])
    list(micro_batches([*groups, *groups], 1, counting))
    distinct = {h.key for e in groups for t in e.group.trajectories for turn in t.turns for h in turn.images}
    assert sorted(prepared) == sorted(distinct)


def test_a_group_without_answers_runs_but_counts_nowhere(
    policy: Policy, layout: Layout, groups: list[TrainGroup]
) -> None:
    empty = TrainGroup(group=Group(prompt=groups[0].group.prompt, trajectories=()), advantages=())
    ((_, batch),) = micro_batches([empty], 1, layout)
    assert batch.tokens.weights.sum() == 0
    assert torch.isfinite(policy(batch)[0]).all()
    ((_, mixed),) = micro_batches([empty, groups[1]], 2, layout)
    assert len(mixed.targets) == sum(t.sampled_tokens for t in groups[1].group.trajectories)


def test_placeholders_without_an_image_are_refused_by_name(layout: Layout, groups: list[TrainGroup]) -> None:
    trajectory = groups[0].group.trajectories[0]
    broken = replace(trajectory, turns=(replace(trajectory.turns[0], images=()),))
    entry = TrainGroup(group=replace(groups[0].group, trajectories=(broken,)), advantages=(1.0,))
    with pytest.raises(ValueError, match=f"sample {groups[0].group.prompt.sample.id}: 1 image placeholders for 0"):
        list(micro_batches([entry], 1, layout))
