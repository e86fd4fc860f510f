"""An engine in fp8: how far its log-probs are from the policy's, and that new weights are quantised anew."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest
import pytest_asyncio
import torch

from learner.weights import WeightSender, weights
from perception.config import LearnerConfig
from perception.types import SamplingSpec
from rollout.defaults import FP8_PARITY_LIMIT
from rollout.pool import RolloutPool
from runtime.placement import anywhere
from tests.hf_reference import Reference
from tests.stack.test_sync import sync
from tests.trainer import CONFIG, PLACEMENT

SAMPLED = SamplingSpec(n=8, temperature=1.0, max_new_tokens=48)
LONG = replace(SAMPLED, max_new_tokens=400)
BFLOAT16_MISMATCH = 0.02
"""Unquantised, this policy is off by half of it."""

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(shared_ray: None, reference: Reference) -> AsyncIterator[RolloutPool]:
    policy, config = replace(reference.policy, dtype="bfloat16"), replace(CONFIG, quantization="fp8")
    pool = RolloutPool(policy, config, PLACEMENT, anywhere(PLACEMENT, "engine", 1))
    await pool.start()
    yield pool
    await pool.shutdown()


async def mismatch(engine: RolloutPool, policy: Reference) -> float:
    """Mean |log-prob difference| over the tokens of a few groups."""
    differences = []
    for seed in range(4):
        group = await engine.generate(policy.prompt(seed), SAMPLED)
        for trajectory in group.trajectories:
            (turn,) = trajectory.turns
            table = policy.logprobs(group.prompt, turn.token_ids, 1.0)
            expected = table[np.arange(len(turn.token_ids)), turn.token_ids]
            differences.append(np.abs(np.array(turn.logprobs) - expected))
    return float(np.concatenate(differences).mean())


async def test_it_is_coarser_than_bfloat16_and_within_its_own_limit(engine: RolloutPool, reference: Reference) -> None:
    assert BFLOAT16_MISMATCH < await mismatch(engine, reference) < FP8_PARITY_LIMIT


@pytest.mark.parametrize(("version", "sent"), [(1, "model."), (2, "model."), (3, "model.language_model.")])
async def test_new_weights_are_quantised_anew(
    engine: RolloutPool, reference: Reference, version: int, sent: str
) -> None:
    """The last time without the vision tower, as with learner.freeze_vision."""
    tower = copy.deepcopy(reference.model.model.visual.state_dict())
    reference.perturb(version)
    if "language" in sent:
        reference.model.model.visual.load_state_dict(tower)
    model = copy.deepcopy(reference.model).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(sent))
    out = WeightSender(
        weights(model), LearnerConfig(bucket_mb=1), rank=0, device=torch.device("cpu"), transport="store"
    )
    assert await mismatch(engine, reference) > FP8_PARITY_LIMIT
    running = asyncio.create_task(engine.generate(reference.prompt(9), LONG))
    await asyncio.sleep(0.3)
    await sync(out, engine, version)
    spans = [[span.version for span in one.turns[0].versions] for one in (await running).trajectories]
    assert [version - 1, version] in spans, "no sample was in flight during the update"
    assert BFLOAT16_MISMATCH < await mismatch(engine, reference) < FP8_PARITY_LIMIT
