"""Guards the learner as the loop uses it: DeepSpeed ranks in Ray actors, against a plain PyTorch loop in this process.

Two ranks start once for every ZeRO stage, and everything is asked of them: steps, weights out, checkpoint, export. The
ranks' micro-batches are small and not equally many: one rank has a filler. The plain loop takes padded rows, all at
once, so that packing, bins, sharding and the sum over ranks are all held against the textbook.
"""

from __future__ import annotations

import asyncio
import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from learner.loss import policy_loss
from learner.policy import load_policy
from learner.pool import LearnerPool, deal, mini_batches
from learner.rank import LearnerRank
from learner.rows import pieces
from learner.weights import WeightSender, weights
from learner.zero import learning_rate
from perception import metric_catalog as catalog
from perception.config import AlgorithmConfig, LearnerConfig, PlacementConfig, RolloutConfig, RunConfig
from perception.types import FailureKind, Group, ImageHandle, ImageSource, LearnerReport, PolicySpec
from runtime.actors import Late
from runtime.placement import anywhere
from runtime.weights import view
from tests import tiny_policy
from tests.builders import config, group, lost, prompt, sampled_group, turn
from tests.fake_gpu import opened, play_ipc
from tests.kept_ranks import KEPT

STEPS = 5
CONFIG = LearnerConfig(
    ranks=2, lr=1e-3, warmup_steps=2, schedule="linear", timeout_s=600.0, bucket_mb=1, micro_tokens=90
)
ALGORITHM = AlgorithmConfig(steps=10, prompts_per_step=3, group_size=3, clip_low=0.3, clip_high=5.0, kl_coef=0.2)
PLACEMENT = PlacementConfig(name="test", device="cpu", learner_cpus=0.5, threads=1)

pytestmark = pytest.mark.usefixtures("shared_ray")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    parity: dict[str, float]
    reports: list[LearnerReport]
    weights: dict[str, Tensor]
    """After STEPS steps."""
    exported: Path
    next_weights: dict[str, Tensor]
    """One step later."""
    again: dict[str, Tensor]
    """After the same step again, from the checkpoint."""
    colocated: tuple[bool, int, list[dict[str, Tensor]]]
    """The same as engines on the ranks' own GPUs get it."""
    stage: int
    fresh: dict[str, Tensor]
    """The same from a new learner; ZeRO-2 only, to save time. `test_train` has one in new processes."""
    failed: tuple[LearnerReport, list[Group], dict[str, float]]
    """A step of groups that all failed; the KL and the parity of such a group beside one that counts."""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> PolicySpec:
    return tiny_policy.build(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def groups(spec: PolicySpec) -> list[Group]:
    rng = np.random.default_rng(1)
    return [sampled_group(spec, rng, n=3, turns=turns) for turns in (1, 2, 1)]


def make_pool(spec: PolicySpec, stage: int, algorithm: AlgorithmConfig = ALGORITHM, **changes: Any) -> LearnerPool:
    wanted = config(
        run=RunConfig(name="test", deterministic=True),
        learner=replace(CONFIG, zero_stage=stage, **changes),  # type: ignore[arg-type]
        algorithm=algorithm,
        placement=PLACEMENT,
        rollout=RolloutConfig(temperature=0.9, max_new_tokens=16),
    )
    return LearnerPool(spec, wanted, anywhere(PLACEMENT, "learner", wanted.learner.ranks))


async def receive(pool: LearnerPool) -> dict[str, Tensor]:
    received: dict[str, Tensor] = {}
    async for bucket in pool.buckets(()):
        assert bucket.transport == "store"
        flat = torch.tensor(ray.get(bucket.payload))
        assert flat.shape == (bucket.nbytes,)
        received |= {slot.name: view(flat, slot) for slot in bucket.slots}
    return received


async def receive_by_ipc(pool: LearnerPool) -> tuple[bool, int, list[dict[str, Tensor]]]:
    """Whether the ranks hand out their parameters themselves, in how many buckets, and what each rank's engine gets."""

    def colocate(rank: LearnerRank) -> bool:
        play_ipc(f"GPU-{rank._rank}")
        rank._sender = WeightSender(
            weights(rank._policy.model), rank._config.learner, rank=rank._rank, device=rank._device, transport="ipc"
        )
        return rank._sender._in_place

    in_place = {await slot.actor.__ray_call__.remote(colocate) for slot in pool.actors.slots}
    buckets = [bucket async for bucket in pool.buckets(())]
    received: list[dict[str, Tensor]] = [{} for _ in pool.actors.slots]
    for bucket in buckets:
        assert set(bucket.payload) == {f"GPU-{rank}" for rank in range(len(received))}
        for rank, own in enumerate(received):
            flat = opened(bucket.payload[f"GPU-{rank}"])
            assert flat.shape == (bucket.nbytes,)
            own |= {slot.name: view(flat, slot) for slot in bucket.slots}
    await pool.release_buckets()
    return *in_place, len(buckets), received


async def resume(spec: PolicySpec, stage: int, groups: list[Group], checkpoint: Path) -> dict[str, Tensor]:
    pool = make_pool(spec, stage)
    KEPT.lend(pool.actors)
    await pool.start()
    await pool.load(str(checkpoint))
    await pool.update(groups)
    weights = await receive(pool)
    await pool.shutdown()
    return weights


async def away_and_back(pool: LearnerPool, weights: dict[str, Tensor]) -> None:
    """States leave the device and return; the step that follows is held against the one after loading."""
    for change in (pool.offload, pool.reload):
        await change()
        assert all(torch.equal(weights[name], one) for name, one in (await receive(pool)).items())


def failed_group(folder: Path) -> Group:
    """One whose image is not there, so that engine and reward worker failed all of it."""
    image = ImageHandle(key="gone", height=56, width=56, ref=ImageSource(path=str(folder / "gone.png")))
    said = turn("[]", (5, 6), input_ids=(300, 1), images=(image,))
    about = prompt(token_ids=(300, 1), images=(image,))
    return group(lost(), lost(FailureKind.SCORER, turns=(said,)), about=about)


async def exercise(spec: PolicySpec, stage: int, ranks: int, groups: list[Group], folder: Path) -> Outcome:
    pool = make_pool(spec, stage, ranks=ranks)
    KEPT.lend(pool.actors)
    await pool.start()
    parity = await pool.parity(groups)
    reports = [await pool.update(groups) for _ in range(STEPS)]
    weights = await receive(pool)
    await pool.export(str(folder / "policy"))
    await pool.save(str(folder / "checkpoint"))
    await away_and_back(pool, weights)
    await pool.update(groups)
    next_weights = await receive(pool)
    await pool.load(str(folder / "checkpoint"))
    await pool.update(groups)
    again = await receive(pool)
    colocated = await receive_by_ipc(pool)
    mixed = [failed_group(folder), groups[0]]
    failed = await pool.update(mixed[:1] * 2), await pool.with_kl(mixed), await pool.parity(mixed)
    await pool.shutdown()
    fresh = await resume(spec, stage, groups, folder / "checkpoint") if (stage, ranks) == (2, 2) else {}
    return Outcome(
        parity=parity,
        reports=reports,
        weights=weights,
        exported=folder / "policy",
        next_weights=next_weights,
        again=again,
        colocated=colocated,
        stage=stage,
        fresh=fresh,
        failed=failed,
    )


@pytest.fixture(scope="module", params=[(1, 2), (2, 2), (3, 2), (2, 1)], ids="zero{0[0]}-ranks{0[1]}".format)
def outcome(
    request: pytest.FixtureRequest, spec: PolicySpec, groups: list[Group], tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    return asyncio.run(exercise(spec, *request.param, groups, tmp_path_factory.mktemp("run")))


@dataclass(frozen=True, kw_only=True)
class Plain:
    mismatch: Tensor
    """Log-prob differences to the engine's before the first step."""
    losses: list[float]
    grad_norms: list[float]
    rates: list[float]
    start: dict[str, Tensor]
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def plain(spec: PolicySpec, groups: list[Group]) -> Plain:
    """The same steps in one process: one batch, torch's AdamW, no DeepSpeed."""
    policy = load_policy(spec, 0.9, LearnerConfig(rows="padded"), lambda handle: handle.ref)
    reference = copy.deepcopy(policy)
    batch = policy.collate(list(pieces(groups, policy.layout, 1 << 20, padded=True)))
    optimizer = torch.optim.AdamW(policy.parameters(), betas=CONFIG.betas, weight_decay=CONFIG.weight_decay)
    start = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    losses, norms = [], []
    rates = [5e-4, 1e-3, 1e-3, 0.875e-3, 0.75e-3]
    with torch.no_grad():
        mismatch = policy(batch)[0] - batch.tokens.rollout_logprobs
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        with torch.no_grad():
            reference_logprobs, _ = reference(batch)
        loss = policy_loss(*policy(batch), replace(batch.tokens, reference_logprobs=reference_logprobs), ALGORITHM)
        loss = loss / len(batch.targets)
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), CONFIG.grad_clip).item())
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    return Plain(mismatch=mismatch, losses=losses, grad_norms=norms, rates=rates, start=start, weights=weights)


def test_sharded_steps_equal_a_plain_loop(outcome: Outcome, plain: Plain) -> None:
    metrics = [report.metrics for report in outcome.reports]
    assert [m[catalog.LOSS] for m in metrics] == pytest.approx(plain.losses, rel=1e-4)
    assert [m[catalog.GRAD_NORM] for m in metrics] == pytest.approx(plain.grad_norms, rel=1e-3)
    assert [m[catalog.LR] for m in metrics] == pytest.approx(plain.rates)
    assert metrics[0][catalog.KL] == 0.0 < metrics[1][catalog.KL]
    moved = {name: plain.weights[name] - plain.start[name] for name in plain.start}
    error = sum((outcome.weights[name] - plain.weights[name]).square().sum() for name in moved)
    # Adam divides by the gradient's size: where that is all rounding, so is the step.
    assert error.sqrt() < 1e-3 * torch.stack([m.square().sum() for m in moved.values()]).sum().sqrt()


def test_buckets_hold_every_parameter_once_and_no_tied_head(outcome: Outcome, plain: Plain) -> None:
    assert list(outcome.weights) == list(plain.start)
    assert "lm_head.weight" not in outcome.weights
    assert {name: w.shape for name, w in outcome.weights.items()} == {n: w.shape for n, w in plain.start.items()}


def test_parity_measures_the_difference_to_the_engine(outcome: Outcome, plain: Plain) -> None:
    expected = plain.mismatch.numpy()
    assert outcome.parity[catalog.LOGPROB_MISMATCH] == pytest.approx(np.abs(expected).mean(), rel=1e-4)
    assert outcome.parity[catalog.LOGPROB_MISMATCH_MAX] == pytest.approx(np.abs(expected).max(), rel=1e-4)
    assert outcome.parity[catalog.RATIO] == pytest.approx(np.exp(expected).mean(), rel=1e-4)


def test_a_checkpoint_goes_on_bit_for_bit(outcome: Outcome) -> None:
    assert any(not torch.equal(outcome.weights[name], w) for name, w in outcome.next_weights.items())
    for name, weight in outcome.next_weights.items():
        assert torch.equal(outcome.again[name], weight), name
    for name, weight in outcome.fresh.items():
        assert torch.equal(outcome.again[name], weight), name


def test_a_step_of_failures_has_no_gradient_and_costs_the_others_nothing(outcome: Outcome) -> None:
    report, (without, beside), parity = outcome.failed
    assert (report.metrics[catalog.LOSS], report.metrics[catalog.GRAD_NORM]) == (0.0, 0.0)
    assert all(np.isfinite(value) for value in report.metrics.values())
    assert [one.kl for one in without.trajectories] == [None, None]
    assert all(one.kl is not None and one.kl > 0 for one in beside.trajectories)
    assert np.isfinite(parity[catalog.LOGPROB_MISMATCH])


def test_the_export_loads_in_transformers(outcome: Outcome) -> None:
    model = AutoModelForImageTextToText.from_pretrained(outcome.exported, dtype=torch.float32)
    loaded = dict(model.named_parameters())
    assert loaded.keys() == outcome.weights.keys()
    for name, weight in outcome.weights.items():
        assert torch.equal(loaded[name], weight), name
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert AutoProcessor.from_pretrained(outcome.exported).tokenizer.eos_token == "<|im_end|>"


def test_a_wait_ends_with_the_name_of_what_it_waited_for(spec: PolicySpec) -> None:
    pool = make_pool(spec, stage=2, timeout_s=0.01)

    async def start() -> None:
        try:
            await pool.start()
        finally:
            await pool.shutdown()

    with pytest.raises(Late, match=r"learner rank 0: open store took more than 0\.01 s \(learner\.timeout_s\)"):
        asyncio.run(start())


def test_groups_are_dealt_out_evenly(spec: PolicySpec) -> None:
    rng = np.random.default_rng(0)
    entries = [sampled_group(spec, rng, n=2, images=0, prompt_tokens=10 * i) for i in range(1, 8)]
    shares = deal(entries, 3)
    assert sorted(id(entry) for share in shares for entry in share) == sorted(map(id, entries))
    lengths = [sum(len(e.prompt.token_ids) for e in share) for share in shares]
    assert max(lengths) < 1.3 * min(lengths)
    assert [len(share) for share in deal(entries[:2], 3)] == [1, 1, 0]


def test_mini_batches_keep_the_order_and_are_never_empty() -> None:
    assert [list(part) for part in mini_batches([*range(7)], 3)] == [[0, 1], [2, 3], [4, 5, 6]]  # type: ignore[list-item]
    assert [list(part) for part in mini_batches([0, 1], 4)] == [[0], [1]]  # type: ignore[list-item]


def test_learning_rate_by_hand() -> None:
    config = LearnerConfig(lr=1.0, warmup_steps=2, schedule="linear")
    assert [learning_rate(config, step, 6) for step in range(7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert learning_rate(LearnerConfig(lr=0.3), 1000, 10) == 0.3


def test_every_rank_hands_its_weights_to_the_engine_on_its_gpu_without_a_copy_where_they_are_whole(
    outcome: Outcome,
) -> None:
    in_place, buckets, received = outcome.colocated
    assert in_place is (outcome.stage < 3)
    assert buckets == 1 or outcome.stage == 3  # ZeRO-1 and 2 keep all of them in one flat buffer
    for own in received:
        assert set(own) == set(outcome.again)
        assert all(torch.equal(value, outcome.again[name]) for name, value in own.items())
