"""Guards what a run may ask of the learner beyond its defaults: adapters, frozen vision tower, offload, bf16, updates.

Each is held against the same thing done plainly: in this process, on one rank, or without the option.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from learner.loss import policy_loss
from learner.policy import load_policy
from learner.pool import LearnerPool
from learner.rows import pieces
from perception import metric_catalog as catalog
from perception.config import AlgorithmConfig, LearnerConfig, LoraConfig, PlacementConfig
from perception.types import LearnerReport, PolicySpec, TrainGroup
from runtime.weights import view
from tests import tiny_policy
from tests.train_groups import train_group

ROOT = Path(__file__).resolve().parents[2]
CONFIG = LearnerConfig(lr=1e-3, timeout_s=600.0, bucket_mb=1, micro_tokens=90)
ALGORITHM = AlgorithmConfig(steps=10, prompts_per_step=3, group_size=3, importance="none", clip_high=5.0)
PLACEMENT = PlacementConfig(name="test", device="cpu", learner_cpus=0.5, threads=1)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> PolicySpec:
    return tiny_policy.build(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def groups(spec: PolicySpec) -> list[TrainGroup]:
    rng = np.random.default_rng(1)
    return [train_group(spec, rng, n=3, turns=turns) for turns in (1, 2, 1)]


class Run:
    """A learner that has taken some steps, and what it then holds."""

    def __init__(
        self,
        spec: PolicySpec,
        groups: list[TrainGroup],
        *,
        steps: int = 2,
        algorithm: AlgorithmConfig = ALGORITHM,
        folder: Path | None = None,
        **settings: Any,
    ) -> None:
        pool = LearnerPool(
            spec, replace(CONFIG, **settings), algorithm, PLACEMENT, temperature=0.9, max_new_tokens=16, seed=3
        )
        self.reports: list[LearnerReport] = []
        self.weights: dict[str, Tensor] = {}

        async def run() -> None:
            await pool.start()
            self.reports += [await pool.train_step(groups) for _ in range(steps)]
            self.kl = await pool.kl([entry.group for entry in groups]) if algorithm.kl_coef else []
            async for bucket in pool.buckets():
                flat = torch.tensor(ray.get(bucket.payload))
                self.weights |= {slot.name: view(flat, slot) for slot in bucket.slots}
            if folder is not None:
                await pool.export(str(folder))

        try:
            asyncio.run(run())
        finally:
            pool.shutdown()

    def metric(self, name: str) -> list[float]:
        return [report.metrics[name] for report in self.reports]


@pytest.fixture(scope="module")
def start(spec: PolicySpec) -> dict[str, Tensor]:
    model = AutoModelForImageTextToText.from_pretrained(spec.path, dtype=torch.float32)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def apart(one: dict[str, Tensor], other: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far apart two runs brought the weights, over how far they went."""
    assert one.keys() == other.keys() and one
    off = sum((one[name] - other[name]).square().sum() for name in one)
    way = sum((one[name] - start[name]).square().sum() for name in one)
    return float((off / way) ** 0.5)


def test_adapters_train_alike_on_shards_and_leave_merged(
    spec: PolicySpec, groups: list[TrainGroup], start: dict[str, Tensor], tmp_path: Path
) -> None:
    algorithm = replace(ALGORITHM, kl_coef=0.1)
    lora = LoraConfig(rank=4, alpha=8)
    sharded = Run(spec, groups, algorithm=algorithm, lora=lora, ranks=2, zero_stage=3, folder=tmp_path / "policy")
    single = Run(spec, groups, algorithm=algorithm, lora=lora, zero_stage=1)
    assert apart(sharded.weights, single.weights, start) < 1e-3
    # What is sent: the adapted linear layers, whole; nothing else has changed.
    linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    adapted = [n for n in start if "language_model" in n and n.split(".")[-2] in linear and n.endswith("weight")]
    assert list(sharded.weights) == adapted
    # B begins at zero, so the first step moves nothing but B; its product with A has at most the adapters' rank.
    moved = sharded.weights["model.language_model.layers.0.mlp.up_proj.weight"]
    moved = moved - start["model.language_model.layers.0.mlp.up_proj.weight"]
    assert torch.linalg.matrix_rank(moved, rtol=1e-4) == 4
    # The reference is the policy without adapters: no KL before the first step, some after.
    assert sharded.metric(catalog.KL)[0] == pytest.approx(0.0, abs=1e-9) and sharded.metric(catalog.KL)[1] > 0
    assert all(value > 0 for group in sharded.kl for value in group)
    exported = dict(AutoModelForImageTextToText.from_pretrained(tmp_path / "policy").named_parameters())
    assert exported.keys() == start.keys()
    for name, weight in start.items():
        assert torch.equal(exported[name], sharded.weights.get(name, weight)), name


def test_a_frozen_vision_tower_stays_and_its_features_are_reused(
    spec: PolicySpec, groups: list[TrainGroup], start: dict[str, Tensor]
) -> None:
    sharded = Run(spec, groups, freeze_vision=True, ranks=2, zero_stage=3)
    single = Run(spec, groups, freeze_vision=True, zero_stage=2, feature_cache_mb=0)
    assert apart(sharded.weights, single.weights, start) < 1e-3
    assert set(sharded.weights) == {name for name in start if "visual" not in name}
    assert single.metric(catalog.FEATURE_HITS) == [0.0, 0.0]
    # Groups are dealt to the same ranks again, so the second step finds every image.
    assert sharded.metric(catalog.FEATURE_HITS)[1] == 1.0
    assert sharded.metric(catalog.MFU)[0] > 0


def test_the_optimizer_steps_alike_in_host_memory(
    spec: PolicySpec, groups: list[TrainGroup], start: dict[str, Tensor]
) -> None:
    away = Run(spec, groups, steps=3, offload_optimizer=True, zero_stage=2)
    assert apart(away.weights, Run(spec, groups, steps=3, zero_stage=2).weights, start) < 1e-3


def test_bf16_steps_too_small_for_bf16_add_up_in_the_masters(spec: PolicySpec, groups: list[TrainGroup]) -> None:
    """A step of 1e-5 is lost on a bf16 weight of 0.1, whose neighbours are 5e-4 away; sixty of them are not."""
    half = replace(spec, dtype="bfloat16")
    run = Run(half, groups, steps=60, lr=1e-5)
    model = AutoModelForImageTextToText.from_pretrained(spec.path, dtype=torch.bfloat16)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    before, after = model.get_parameter(name), run.weights[name]
    assert after.dtype == torch.bfloat16
    large = before.abs() > 0.1
    assert (after != before)[large].float().mean() > 0.3


def test_several_steps_over_a_batch_follow_the_policy_from_its_beginning(
    spec: PolicySpec, groups: list[TrainGroup], start: dict[str, Tensor]
) -> None:
    """Two mini-batches, twice: the old policy is the learner's before the first of four steps, for all of them, and the
    learning rate falls from step to step."""
    algorithm = replace(ALGORITHM, steps=1, updates=2, epochs=2, importance="token", importance_cap=1.5)
    run = Run(spec, groups, steps=1, algorithm=algorithm, schedule="linear")
    policy = load_policy(spec, 0.9, LearnerConfig(rows="padded"), lambda handle: handle.ref)
    batches = [policy.collate(list(pieces(part, policy.layout, 1 << 20))) for part in (groups[:1], groups[1:])]
    with torch.no_grad():
        before = [copy.deepcopy(policy)(batch)[0] for batch in batches]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=CONFIG.lr, weight_decay=0.0)
    norms = []
    for epoch in range(2):
        for number, (batch, old) in enumerate(zip(batches, before, strict=True)):
            optimizer.param_groups[0]["lr"] = CONFIG.lr * (1 - (2 * epoch + number) / 4)
            loss = policy_loss(*policy(batch), replace(batch.tokens, old_logprobs=old), algorithm) / len(batch.targets)
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)))
            optimizer.step()
            optimizer.zero_grad()
    assert apart(run.weights, {name: p.detach() for name, p in policy.model.named_parameters()}, start) < 1e-3
    assert run.metric(catalog.GRAD_NORM)[0] == pytest.approx(np.mean(norms), rel=1e-3)
    assert run.metric(catalog.LR) == [pytest.approx(CONFIG.lr / 4)]


def test_a_mini_batch_of_failures_has_no_gradient(spec: PolicySpec, groups: list[TrainGroup]) -> None:
    failed = tuple(replace(t, turns=()) for t in groups[0].group.trajectories)
    nothing = replace(groups[0], group=replace(groups[0].group, trajectories=failed))
    run = Run(spec, [nothing, groups[1]], steps=1, algorithm=replace(ALGORITHM, updates=2))
    assert np.isfinite(run.metric(catalog.LOSS)[0]) and run.metric(catalog.GRAD_NORM)[0] > 0
    assert all(torch.isfinite(weight).all() for weight in run.weights.values())


def test_padded_rows_train_alike_and_say_what_they_waste(
    spec: PolicySpec, groups: list[TrainGroup], start: dict[str, Tensor]
) -> None:
    packed, padded = Run(spec, groups), Run(spec, groups, rows="padded", ranks=2)
    # Adam divides by the gradient's size: where that is all rounding, as where patches are summed in another order, so
    # is the step.
    assert apart(packed.weights, padded.weights, start) < 1e-2
    (packing, _), (waste, _) = packed.metric(catalog.PACKING), padded.metric(catalog.PACKING)
    assert packing > 1.5 > 1.0 >= waste > 0.5
    assert packed.metric(catalog.ROW_FILL)[0] == 1.0 > padded.metric(catalog.ROW_FILL)[0]
    for run in (packed, padded):
        assert all(value > 0 for name in (catalog.MFU, catalog.PEAK_MEMORY) for value in run.metric(name))
        assert run.metric(catalog.COMPILED) == [0.0, 0.0]
    # Both saw nine trajectories; tokens are those of the rows each made.
    tokens = [
        run.metric(catalog.LEARNER_TOKENS_PER_S)[0] / run.metric(catalog.LEARNER_SAMPLES_PER_S)[0]
        for run in (packed, padded)
    ]
    assert tokens[1] / tokens[0] == pytest.approx(packing, rel=1e-3)
