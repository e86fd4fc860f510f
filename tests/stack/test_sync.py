"""The learner's weights in running vLLM engines: all of them, by every transport a CPU has, and proven to be there.

Two engines start with one policy; everything sent is another one, of which every parameter differs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import numpy as np
import pytest
import pytest_asyncio
import ray
import torch

from learner.pool import LearnerPool
from learner.weights import WeightSender, weights
from perception.config import LearnerConfig, PlacementConfig, RolloutConfig
from perception.types import SamplingSpec
from perception.weights import UpdateReport, WeightBucket
from rollout.pool import RolloutPool
from runtime.actors import ActorError
from runtime.placement import anywhere
from tests.builders import config
from tests.hf_reference import Reference
from tests.listeners import listeners, outside
from tests.tiny_policy import build

LEARNER = LearnerConfig(bucket_mb=1, checksum=True, timeout_s=120, ranks=2, zero_stage=3)
PLACEMENT = PlacementConfig(name="test", device="cpu", threads=1, learner_cpus=0.5, transport="gloo")
GREEDY = SamplingSpec(n=1, temperature=0.0, max_new_tokens=24)
SAMPLED = SamplingSpec(n=8, temperature=1.0, max_new_tokens=400)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The policy to be sent."""
    reference = Reference(build(tmp_path_factory.mktemp("other"), seed=1))
    reference.perturb(1)  # also the norms and biases, which every seed leaves alike
    reference.model.save_pretrained(reference.policy.path)
    return reference


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines(shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RolloutPool]:
    policy = build(tmp_path_factory.mktemp("policy"), seed=0)
    config = RolloutConfig(engines=2, max_model_len=1024, kv_cache_mb=64, request_timeout_s=120)
    pool = RolloutPool(policy, config, PLACEMENT, anywhere(PLACEMENT, "engine", 2))
    await pool.start()
    yield pool
    await pool.shutdown()


def sender(reference: Reference, transport: str) -> WeightSender:
    """A learner of one rank, in this process."""
    return WeightSender(weights(reference.model), LEARNER, rank=0, device=torch.device("cpu"), transport=transport)


async def sync(
    out: WeightSender,
    engines: RolloutPool,
    version: int,
    change: Callable[[WeightBucket], WeightBucket] = lambda bucket: bucket,
) -> list[UpdateReport]:
    for index in range(out.open(engines.begin_update())):
        bucket = out.fill_bucket(index)
        assert bucket is not None
        await engines.stage(change(bucket))
    out.flush()
    reports = await engines.end_update(version)
    out.release()
    return reports


async def assert_engines_are(engines: RolloutPool, policy: Reference, version: int) -> None:
    """Greedy tokens of both, and their log-probs, are those of transformers."""
    for seed in (4, 5):  # the seed decides the engine
        prompt = policy.prompt(seed)
        (turn,) = (await engines.sample(prompt, 0, (), None, GREEDY)).turns
        table = policy.logprobs(prompt, turn.token_ids, 1.0)
        assert turn.token_ids == tuple(table.argmax(-1))
        np.testing.assert_allclose(turn.logprobs, table.max(-1), atol=1e-5, rtol=0)
        assert [span.version for span in turn.versions] == [version]


def own(engines: RolloutPool) -> Reference:
    """The policy they started with."""
    return Reference(engines.actors._arguments(0)[0])


async def reset(engines: RolloutPool) -> None:
    """The engines' own policy again."""
    await sync(sender(own(engines), "store"), engines, version=0)


@pytest.mark.parametrize("transport", ["store", "gloo"])
async def test_every_parameter_reaches_every_engine_and_the_checksum_proves_it(
    engines: RolloutPool, other: Reference, transport: str
) -> None:
    await reset(engines)
    out = sender(other, transport)
    nbytes = sum(parameter.nbytes for parameter in other.model.parameters())
    for version in (1, 2):  # the second one finds groups and buffers already there
        reports = await sync(out, engines, version)
        assert [report.version for report in reports] == [version] * 2
        assert all(report.nbytes >= nbytes and report.checksum is not None for report in reports)
        await assert_engines_are(engines, other, version)


async def test_only_what_is_trained_is_sent_and_the_rest_is_summed_all_the_same(engines: RolloutPool) -> None:
    await reset(engines)
    trained = own(engines)
    trained.model.requires_grad_(False)
    layer = trained.model.model.language_model.layers[1].requires_grad_(True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.05
    reports = await sync(sender(trained, "gloo"), engines, version=1)
    sent = sum(parameter.nbytes for parameter in layer.parameters())
    assert all(sent <= report.nbytes < sent + 16 * 12 for report in reports)  # and what aligns them
    await assert_engines_are(engines, trained, version=1)


async def test_staging_leaves_requests_in_flight_alone(engines: RolloutPool, other: Reference) -> None:
    await reset(engines)
    old = own(engines)
    prompt = other.prompt(6)
    running = asyncio.create_task(engines.generate(prompt, SAMPLED))
    await asyncio.sleep(0.1)
    out = sender(other, "gloo")
    for index in range(out.open(engines.begin_update())):
        await engines.stage(out.fill_bucket(index))
    out.flush()
    assert not running.done()
    group = await running  # to its end, with everything staged
    reports = await engines.end_update(1)
    for trajectory in group.trajectories:
        (turn,) = trajectory.turns
        assert [span.version for span in turn.versions] == [0]
        table = old.logprobs(prompt, turn.token_ids, 1.0)
        expected = table[np.arange(len(turn.token_ids)), turn.token_ids]
        np.testing.assert_allclose(turn.logprobs, expected, atol=1e-4, rtol=0)  # long rows round more
    assert all(report.pause_seconds < report.transfer_seconds for report in reports)
    await assert_engines_are(engines, other, version=1)


def flip_a_bit(bucket: WeightBucket) -> WeightBucket:
    payload = ray.get(bucket.payload).copy()
    payload[bucket.slots[1].offset + 5] ^= 1
    return replace(bucket, payload=payload)


def leave_one_out(bucket: WeightBucket) -> WeightBucket:
    return replace(bucket, slots=bucket.slots[1:])


def swap_two(bucket: WeightBucket) -> WeightBucket:
    """The same layer norm of two layers: the same numbers, in each other's place."""
    name = "model.language_model.layers.{}.input_layernorm.weight"
    other = {name.format(0): name.format(1), name.format(1): name.format(0)}
    return replace(bucket, slots=tuple(replace(slot, name=other.get(slot.name, slot.name)) for slot in bucket.slots))


@pytest.mark.parametrize("change", [flip_a_bit, leave_one_out, swap_two])
async def test_a_single_wrong_parameter_fails_the_checksum(
    engines: RolloutPool, other: Reference, change: Callable[[WeightBucket], WeightBucket]
) -> None:
    await reset(engines)
    with pytest.raises(ActorError, match=r"rollout engine 0 does not hold the learner's weights .* of version 3"):
        await sync(sender(other, "store"), engines, 3, change)


async def test_a_bucket_that_does_not_arrive_is_named(engines: RolloutPool, other: Reference) -> None:
    silent = sender(other, "gloo")
    silent.open(engines.begin_update())
    assert silent._broadcast is not None
    bucket = WeightBucket(slots=(), nbytes=16, transport="gloo", payload=silent._address)
    await impose(engines, replace(engines._config, request_timeout_s=1.0))
    await engines.stage(bucket)
    missing = r"rollout engine \d, taking new weights: UpdateFailed: receiving the staged buckets took more than 1 s"
    with pytest.raises(ActorError, match=missing):
        await engines.end_update(1)
    await impose(engines, engines._config)


async def impose(engines: RolloutPool, config: RolloutConfig) -> None:
    for slot in engines.actors.slots:
        await slot.actor.__ray_call__.remote(lambda self: setattr(self._updates, "_config", config))


async def test_a_zero_3_learner_of_two_ranks_sends_every_parameter(engines: RolloutPool, other: Reference) -> None:
    await reset(engines)
    start = dict(own(engines).model.named_parameters())
    for name, parameter in other.model.named_parameters():
        assert (start[name] != parameter).float().mean() > 0.9, name
    learner = LearnerPool(other.policy, config(learner=LEARNER, placement=PLACEMENT), anywhere(PLACEMENT, "learner", 2))
    try:
        await learner.start()
        for version in (1, 2):
            async for bucket in learner.buckets(engines.begin_update()):
                await engines.stage(bucket)
            await engines.end_update(version)
            await learner.release_buckets()
            await assert_engines_are(engines, other, version)
        found, (host, port, _) = listeners(), bucket.payload
        assert (host, port) in {one[1:] for one in found} and any("EngineCore" in one[0] for one in found)
        assert outside(found) == set()  # neither the process groups nor their rendezvous
    finally:
        await learner.shutdown()


async def test_a_restarted_engine_joins_a_new_broadcast(engines: RolloutPool, other: Reference) -> None:
    out = sender(other, "gloo")
    await sync(out, engines, version=1)
    engines._resync = lambda: sync(out, engines, version=1)
    (dead, alive), greedy = [slot.actor for slot in engines.actors.slots], replace(GREEDY, max_new_tokens=2)
    ray.kill(dead)
    await engines.sample(other.prompt(4), 0, (), None, greedy)  # finds it dead and turns to the other one
    revival = engines.actors.slots[0].revival
    assert revival is not None
    await revival
    assert engines.actors.restarts == 1 and engines.actors.slots[1].actor is alive
    await assert_engines_are(engines, other, version=1)
    await sync(out, engines, version=2)
    await assert_engines_are(engines, other, version=2)
