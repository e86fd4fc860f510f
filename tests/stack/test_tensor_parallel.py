"""An engine of two workers: it samples, takes new weights and proves that it has them, and leaves nothing behind.

The tiny policy has one key-value head, which both workers hold, as they do the vision tower; the rest they share.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import psutil
import pytest
import pytest_asyncio
import ray

from perception.types import Group, SamplingSpec
from perception.weights import WeightBucket
from rollout.pool import RolloutPool
from runtime.actors import ActorError
from runtime.placement import anywhere
from tests.hf_reference import Reference
from tests.listeners import listeners, outside
from tests.stack.test_sync import sender, sync
from tests.trainer import CONFIG, PLACEMENT

SAMPLED = SamplingSpec(n=4, temperature=1.0, max_new_tokens=48)
LONG = replace(SAMPLED, max_new_tokens=400)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(shared_ray: None, reference: Reference) -> AsyncIterator[RolloutPool]:
    seats = anywhere(PLACEMENT, "engine", 1, tensor_parallel=2)
    assert seats[0].cpus == 2
    pool = RolloutPool(reference.policy, replace(CONFIG, tensor_parallel=2), PLACEMENT, seats)
    await pool.start()
    yield pool
    await pool.shutdown()


def assert_is(policy: Reference, group: Group, versions: list[int], part: slice = slice(None)) -> None:
    """The log-probs of every answer, or a part of them, are those of transformers."""
    for trajectory in group.trajectories:
        (turn,) = trajectory.turns
        table = policy.logprobs(group.prompt, turn.token_ids, 1.0)
        expected = table[np.arange(len(turn.token_ids)), turn.token_ids]
        np.testing.assert_allclose(turn.logprobs, expected, atol=1e-4, rtol=0)
        assert [span.version for span in turn.versions] == versions


async def test_answers_have_the_log_probs_of_transformers(engine: RolloutPool, reference: Reference) -> None:
    assert_is(reference, await engine.generate(reference.prompt(1), SAMPLED), [0])
    assert outside(listeners()) == set()  # nor is what the workers say to one another heard elsewhere


@pytest.mark.parametrize(("transport", "version"), [("store", 1), ("gloo", 2), ("gloo", 3)])
async def test_new_weights_reach_both_workers_and_their_checksums_add_up(
    engine: RolloutPool, reference: Reference, transport: str, version: int
) -> None:
    running = asyncio.create_task(engine.generate(reference.prompt(2), LONG))
    await asyncio.sleep(0.3)
    reference.perturb(version)
    (report,) = await sync(sender(reference, transport), engine, version)
    assert report.checksum is not None
    assert_is(reference, await engine.generate(reference.prompt(2), SAMPLED), [version])
    spans = [[span.version for span in one.turns[0].versions] for one in (await running).trajectories]
    assert [version - 1, version] in spans, "no sample was in flight during the update"


_LAYER = "model.language_model.layers.1."


@pytest.mark.parametrize(
    "name",
    [
        f"{_LAYER}self_attn.q_proj.weight",
        f"{_LAYER}self_attn.k_proj.bias",
        f"{_LAYER}self_attn.o_proj.weight",
        f"{_LAYER}mlp.up_proj.weight",
        f"{_LAYER}mlp.down_proj.weight",
        f"{_LAYER}input_layernorm.weight",
        "model.language_model.embed_tokens.weight",
        "model.visual.blocks.0.attn.qkv.weight",
        "model.visual.merger.mlp.2.bias",
    ],
)
@pytest.mark.parametrize("element", [0, -1])  # of the first worker's shard, and of the last one's
async def test_a_single_wrong_element_shows(engine: RolloutPool, reference: Reference, name: str, element: int) -> None:
    def change(bucket: WeightBucket) -> WeightBucket:
        payload = ray.get(bucket.payload).copy()
        for slot in bucket.slots:
            if slot.name == name:
                size = 4 * int(np.prod(slot.shape))
                payload[slot.offset : slot.offset + size].view(np.float32)[element] += 1.0
        return replace(bucket, payload=payload)

    with pytest.raises(ActorError, match=r"engine 0 does not hold the learner's weights .* of version 4"):
        await sync(sender(reference, "store"), engine, 4, change)


async def test_nothing_is_left_of_an_engine_whose_actor_is_killed(engine: RolloutPool) -> None:
    actor = psutil.Process(await engine.actors.slots[0].actor.__ray_call__.remote(lambda self: os.getpid()))
    family = actor.children(recursive=True)
    assert len([one for one in family if "VLLM" in one.name()]) == 3, [one.name() for one in family]
    actor.kill()
    assert psutil.wait_procs(family, timeout=20)[1] == []
