"""Guards what a run may ask of the learner beyond its defaults: adapters, frozen vision tower, offload, bf16, updates.

Each is held against the same thing done plainly: in this process, on one rank, or without the option.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator, Sequence
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
from perception.config import AlgorithmConfig, LearnerConfig, LoraConfig, PlacementConfig, RolloutConfig
from perception.types import FailureKind, Group, LearnerReport, PolicySpec
from runtime.placement import anywhere
from runtime.weights import view
from tests import tiny_policy
from tests.builders import config, failure, sampled_group
from tests.kept_ranks import KEPT

ALGORITHM = AlgorithmConfig(steps=10, prompts_per_step=3, group_size=3, importance="none", clip_high=5.0)
PLACEMENT = PlacementConfig(name="test", device="cpu", learner_cpus=0.5, threads=1)
CONFIG = config(
    learner=LearnerConfig(lr=1e-3, timeout_s=600.0, bucket_mb=1, micro_tokens=90),
    placement=PLACEMENT,
    rollout=RolloutConfig(temperature=0.9, max_new_tokens=16),
)

pytestmark = pytest.mark.usefixtures("kept")


@pytest.fixture(scope="module")
def kept(shared_ray: None) -> Iterator[None]:
    yield
    KEPT.end()


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> PolicySpec:
    return tiny_policy.build(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def groups(spec: PolicySpec) -> list[Group]:
    rng = np.random.default_rng(1)
    return [sampled_group(spec, rng, n=3, turns=turns) for turns in (1, 2, 1)]


class Run:
    """A learner that has taken some steps, and what it then holds."""

    def __init__(
        self,
        spec: PolicySpec,
        groups: list[Group],
        *,
        steps: int = 2,
        then: Sequence[list[Group]] = (),
        algorithm: AlgorithmConfig = ALGORITHM,
        folder: Path | None = None,
        **settings: Any,
    ) -> None:
        """`steps` steps over the groups, and one over each batch of `then`."""
        wanted = replace(CONFIG, learner=replace(CONFIG.learner, **settings), algorithm=algorithm)
        pool = LearnerPool(spec, wanted, anywhere(PLACEMENT, "learner", wanted.learner.ranks))
        KEPT.lend(pool.actors)
        self.reports: list[LearnerReport] = []
        self.history: list[dict[str, Tensor]] = []
        """The weights after every step of `then`, and before the first of them."""
        self.kl: list[Group] = []

        async def weights() -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            async for bucket in pool.buckets():
                flat = torch.tensor(ray.get(bucket.payload))
                found |= {slot.name: view(flat, slot) for slot in bucket.slots}
            return found

        async def run() -> None:
            try:
                await pool.start()
                self.reports += [await pool.update(groups) for _ in range(steps)]
                self.history.append(await weights())
                for batch in then:
                    self.reports.append(await pool.update(batch))
                    self.history.append(await weights())
                if algorithm.kl_coef:
                    self.kl = await pool.with_kl(groups)
                if folder is not None:
                    await pool.export(str(folder))
            finally:
                await pool.shutdown()

        asyncio.run(run())

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.history[-1]

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
    spec: PolicySpec, groups: list[Group], start: dict[str, Tensor], tmp_path: Path
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
    assert all(one.kl is not None and one.kl > 0 for group in sharded.kl for one in group.trajectories)
    exported = dict(AutoModelForImageTextToText.from_pretrained(tmp_path / "policy").named_parameters())
    assert exported.keys() == start.keys()
    for name, weight in start.items():
        assert torch.equal(exported[name], sharded.weights.get(name, weight)), name


def test_a_frozen_vision_tower_stays_and_its_features_are_reused(
    spec: PolicySpec, groups: list[Group], start: dict[str, Tensor]
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
    spec: PolicySpec, groups: list[Group], start: dict[str, Tensor]
) -> None:
    away = Run(spec, groups, steps=3, offload_optimizer=True, zero_stage=2)
    assert apart(away.weights, Run(spec, groups, steps=3, zero_stage=2).weights, start) < 1e-3


def test_bf16_steps_too_small_for_bf16_add_up_in_the_masters(spec: PolicySpec, groups: list[Group]) -> None:
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
    spec: PolicySpec, groups: list[Group], start: dict[str, Tensor]
) -> None:
    """Two mini-batches, twice: the old policy is the learner's before the first of four steps, for all of them, and the
    learning rate falls from step to step."""
    algorithm = replace(ALGORITHM, steps=1, updates=2, epochs=2, importance="token", importance_cap=1.5)
    run = Run(spec, groups, steps=1, algorithm=algorithm, schedule="linear")
    policy = load_policy(spec, 0.9, LearnerConfig(rows="padded"), lambda handle: handle.ref)
    batches = [policy.collate(list(pieces(part, policy.layout, 1 << 20))) for part in (groups[:1], groups[1:])]
    with torch.no_grad():
        before = [copy.deepcopy(policy)(batch)[0] for batch in batches]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=CONFIG.learner.lr, weight_decay=0.0)
    norms = []
    for epoch in range(2):
        for number, (batch, old) in enumerate(zip(batches, before, strict=True)):
            optimizer.param_groups[0]["lr"] = CONFIG.learner.lr * (1 - (2 * epoch + number) / 4)
            loss = policy_loss(*policy(batch), replace(batch.tokens, old_logprobs=old), algorithm) / len(batch.targets)
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)))
            optimizer.step()
            optimizer.zero_grad()
    assert apart(run.weights, {name: p.detach() for name, p in policy.model.named_parameters()}, start) < 1e-3
    assert run.metric(catalog.GRAD_NORM)[0] == pytest.approx(np.mean(norms), rel=1e-3)
    assert run.metric(catalog.LR) == [pytest.approx(CONFIG.learner.lr / 4)]


def test_a_mini_batch_of_failures_has_no_gradient(spec: PolicySpec, groups: list[Group]) -> None:
    nothing = replace(groups[0], trajectories=tuple(replace(one, turns=()) for one in groups[0].trajectories))
    run = Run(spec, [nothing, groups[1]], steps=1, algorithm=replace(ALGORITHM, updates=2))
    assert np.isfinite(run.metric(catalog.LOSS)[0]) and run.metric(catalog.GRAD_NORM)[0] > 0
    assert all(torch.isfinite(weight).all() for weight in run.weights.values())


def failed(group: Group, kind: FailureKind) -> Group:
    """What was sampled is still there; nothing of it may count."""
    return replace(group, trajectories=tuple(replace(one, failure=failure(kind)) for one in group.trajectories))


def with_as_many_failed(spec: PolicySpec, groups: list[Group]) -> list[Group]:
    rng = np.random.default_rng(5)
    lost = [failed(sampled_group(spec, rng, n=3), kind) for kind in (FailureKind.SCORER, FailureKind.ENGINE)]
    lost.append(failed(sampled_group(spec, rng, n=3, turns=2), FailureKind.SCORER))
    return [lost[0], groups[0], groups[1], lost[1], groups[2], lost[2]]


@pytest.mark.parametrize("aggregate", ["token", "sequence"])  # "constant" counts sequences, too
def test_a_scorers_failure_does_not_dilute_the_step(spec: PolicySpec, groups: list[Group], aggregate: str) -> None:
    """With half of the groups failed, loss and gradient are those of the other half alone."""
    half, algorithm = with_as_many_failed(spec, groups), replace(ALGORITHM, aggregate=aggregate, kl_coef=0.1)
    still = Run(spec, groups, steps=1, then=[half], algorithm=algorithm, lr=1e-12)  # the weights stay where they are
    assert still.metric(catalog.GRAD_NORM)[1] == pytest.approx(still.metric(catalog.GRAD_NORM)[0], rel=1e-6)
    assert still.metric(catalog.LOSS)[1] == pytest.approx(still.metric(catalog.LOSS)[0], rel=1e-6, abs=1e-9)
    assert still.metric(catalog.ENTROPY)[1] == pytest.approx(still.metric(catalog.ENTROPY)[0], rel=1e-6)


def test_a_step_with_failures_ends_at_the_same_weights(spec: PolicySpec, groups: list[Group]) -> None:
    half, algorithm = with_as_many_failed(spec, groups), replace(ALGORITHM, kl_coef=0.1)
    alone, mixed = (Run(spec, batch, steps=1, algorithm=algorithm) for batch in (groups, half))
    for name, weight in alone.weights.items():
        assert torch.allclose(mixed.weights[name], weight, rtol=0, atol=1e-6), name
    # and the KL that goes into the reward is not measured of what failed either
    measured = [[one.kl is not None for one in group.trajectories] for group in mixed.kl]
    assert measured == [[False] * 3, [True] * 3, [True] * 3, [False] * 3, [True] * 3, [False] * 3]


@pytest.mark.parametrize("stage", [2, 3])  # 1 and 2 are one class of DeepSpeed's
def test_a_step_that_is_not_finite_leaves_the_weights_bit_for_bit(
    spec: PolicySpec, groups: list[Group], stage: int
) -> None:
    """One trajectory on one of two ranks makes loss and gradient infinite. The step after it is as if there had been
    none (the optimizer's moments were left alone, too)."""
    first = groups[0].trajectories[0]
    bad = replace(groups[0], trajectories=(replace(first, advantage=float("inf")), *groups[0].trajectories[1:]))
    poisoned = [bad, *groups[1:]]
    run = Run(spec, groups, steps=1, then=[poisoned, groups], ranks=2, zero_stage=stage)
    assert run.metric(catalog.SKIPPED) == [0.0, 1.0, 0.0]
    assert run.metric(catalog.OPTIMIZER_STEPS) == [1.0, 0.0, 1.0]
    assert not np.isfinite(run.metric(catalog.LOSS)[1])
    before, after, later = run.history
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert any(not torch.equal(later[name], weight) for name, weight in before.items())
    if stage == 2:
        untouched = Run(spec, groups, steps=2, ranks=2, zero_stage=stage)
        for name, weight in untouched.weights.items():
            assert torch.allclose(later[name], weight, rtol=0, atol=1e-7), name


def test_only_the_mini_batch_that_is_not_finite_is_skipped(spec: PolicySpec, groups: list[Group]) -> None:
    nan = replace(groups[0], trajectories=tuple(replace(one, advantage=np.nan) for one in groups[0].trajectories))
    run = Run(spec, [nan, groups[1]], steps=1, algorithm=replace(ALGORITHM, updates=2), ranks=2)
    assert (run.metric(catalog.SKIPPED), run.metric(catalog.OPTIMIZER_STEPS)) == ([1.0], [1.0])
    assert np.isfinite(run.metric(catalog.LOSS)[0]) and np.isfinite(run.metric(catalog.GRAD_NORM)[0])
    assert all(torch.isfinite(weight).all() for weight in run.weights.values())


def test_padded_rows_train_alike_and_say_what_they_waste(
    spec: PolicySpec, groups: list[Group], start: dict[str, Tensor]
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
