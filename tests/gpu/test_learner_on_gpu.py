"""What only a CUDA device can show of the learner: FlexAttention, compilation, memory. `make test-gpu` runs it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from learner.families.packed import ROW_BUCKETS, row_multiple
from learner.policy import Policy, load_policy
from learner.pool import LearnerPool
from learner.rows import pieces
from perception import metric_catalog as catalog
from perception.config import AlgorithmConfig, LearnerConfig, PlacementConfig
from perception.types import Group, PolicySpec
from runtime.cluster import ROOT
from runtime.placement import anywhere
from tests import builders, tiny_families
from tests.builders import sampled_group
from tests.gradients import distance, evaluate

pytestmark = pytest.mark.gpu
BUDGET = 2048


def load(spec: PolicySpec, dtype: str = "float32", **settings: object) -> Policy:
    config = LearnerConfig(micro_tokens=BUDGET, **settings)  # type: ignore[arg-type]
    return load_policy(replace(spec, dtype=dtype), 0.8, config, lambda handle: handle.ref).to("cuda")


def in_order(policy: Policy, groups: list[Group]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs in the order of groups and trajectories, and the gradient of sum(advantage * log-prob)."""
    found, gradient = evaluate(policy, groups, BUDGET)
    return torch.cat([found[key] for key in sorted(found)]), gradient


@pytest.fixture
def groups(spec: PolicySpec) -> list[Group]:
    rng = np.random.default_rng(0)
    return [
        sampled_group(spec, rng, side=112),
        sampled_group(spec, rng, turns=2, n=3),
        sampled_group(spec, rng, images=0),
    ]


@pytest.fixture(params=["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> PolicySpec:
    return tiny_families.build(request.param, tmp_path)


def test_packed_rows_on_cuda_equal_padded_ones(spec: PolicySpec, groups: list[Group]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    ours, our_gradient = in_order(load(spec), groups)
    theirs, their_gradient = in_order(load(spec, rows="padded"), groups)
    assert (ours - theirs).abs().max() < 1e-3
    assert distance(our_gradient, their_gradient) < 1e-2


def test_bf16_packed_rows_with_the_varlen_kernel_stay_close(spec: PolicySpec, groups: list[Group]) -> None:
    ours, _ = in_order(load(spec, "bfloat16"), groups)
    theirs, _ = in_order(load(spec, rows="padded"), groups)
    assert (ours - theirs).abs().mean() < 0.05


def test_compilations_are_bounded_whatever_the_lengths(tmp_path: Path) -> None:
    spec = tiny_families.build("qwen2_5_vl", tmp_path)
    policy = load(spec, compile=True)
    rng = np.random.default_rng(0)
    batches = [[sampled_group(spec, rng, answer_tokens=int(rng.integers(4, 200)))] for _ in range(12)]
    lengths = {policy.collate(list(pieces(groups, policy.layout, BUDGET))).computed for groups in batches}
    assert len(lengths) <= ROW_BUCKETS and all(length % row_multiple(length, BUDGET) == 0 for length in lengths)
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    plain = load(spec)
    for groups in batches:
        assert (in_order(policy, groups)[0] - in_order(plain, groups)[0]).abs().max() < 1e-3
    made = counters["stats"]["unique_graphs"] - before
    assert made <= 3 * len(lengths) + 8  # text layers, attention in and outside them by length; few for vision and head
    for groups in batches:
        in_order(policy, groups)
    assert counters["stats"]["unique_graphs"] - before == made


@pytest.mark.parametrize("settings", [{"compile": True}, {"offload_optimizer": True, "checkpointing": "on"}], ids=str)
def test_a_rank_takes_steps_on_cuda(settings: dict[str, object], tmp_path: Path) -> None:
    import asyncio

    spec = replace(tiny_families.build("qwen2_5_vl", tmp_path), dtype="bfloat16")
    rng = np.random.default_rng(0)
    groups = [sampled_group(spec, rng, side=112) for _ in range(4)]
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    try:
        config = LearnerConfig(lr=1e-3, micro_tokens=BUDGET, **settings)  # type: ignore[arg-type]
        algorithm = AlgorithmConfig(steps=2, prompts_per_step=4, group_size=4)
        placement = PlacementConfig(name="test", device="cuda", learner_gpus=1)
        seats = anywhere(placement, "learner", 1)
        pool = LearnerPool(spec, builders.config(learner=config, algorithm=algorithm, placement=placement), seats)

        async def run() -> list[dict[str, float]]:
            await pool.start()
            first = await pool.update(groups)
            await pool.offload()
            await pool.reload()
            return [dict(report.metrics) for report in (first, await pool.update(groups))]

        first, second = asyncio.run(run())
    finally:
        ray.shutdown()
    assert 0 < first[catalog.MFU] < 1 and 0 < first[catalog.PEAK_MEMORY] < 4
    assert second[catalog.LOSS] != first[catalog.LOSS]
