"""Qwen3.5 in a real engine: its linear attention samples what transformers would, before and after new weights.

bfloat16: the engine's kernels on the CPU know no other. A convolution's weight that is read in another order than it is
kept in puts log-probs off by 1.0 on average, stale weights by 0.8.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.run.parity import LIMITS
from perception.types import Group, SamplingSpec
from rollout.pool import RolloutPool
from runtime.placement import anywhere
from tests import tiny_families
from tests.hf_reference import Reference
from tests.stack.test_sync import sender, sync
from tests.trainer import CONFIG, PLACEMENT

SAMPLED = SamplingSpec(n=4, temperature=1.0, max_new_tokens=48)


def mismatch(group: Group, reference: Reference) -> float:
    """Mean |log-prob difference| of the sampled tokens."""
    found = []
    for trajectory in group.trajectories:
        (turn,) = trajectory.turns
        table = reference.logprobs(group.prompt, turn.token_ids, SAMPLED.temperature)
        found.append(np.abs(table[np.arange(len(turn.token_ids)), turn.token_ids] - turn.logprobs))
    return float(np.concatenate(found).mean())


def become(reference: Reference, dtype: torch.dtype) -> None:
    """Its parameters; rotary frequencies stay in float32."""
    for parameter in reference.model.parameters():
        parameter.data = parameter.data.to(dtype)


@pytest.mark.asyncio
async def test_log_probs_are_those_of_transformers_before_and_after_an_update(shared_ray: None, tmp_path: Path) -> None:
    policy = replace(tiny_families.build("qwen3_5", tmp_path), dtype="bfloat16")
    pool = RolloutPool(policy, CONFIG, PLACEMENT, anywhere(PLACEMENT, "engine", 1))
    await pool.start()
    try:
        reference = Reference(policy)
        for version in range(2):
            group = await pool.generate(reference.prompt(version), SAMPLED)
            assert {span.version for t in group.trajectories for span in t.turns[0].versions} == {version}
            assert mismatch(group, reference) < LIMITS["bfloat16"] / 2
            reference.perturb(version)
            assert mismatch(group, reference) > 0.3, "the weights have changed"
            become(reference, torch.bfloat16)
            await sync(sender(reference, "store"), pool, version + 1)  # the engine's checksum is compared
            become(reference, torch.float32)
    finally:
        await pool.shutdown()
