"""Qwen3.5 in a real engine: its linear attention samples what transformers would, before and after new weights.

bfloat16: the engine's kernels on the CPU know no other. A convolution's weight that is read in another order than it is
kept in puts log-probs off by 1.0 on average, stale weights by 0.8.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from launch.run.parity import LIMITS
from perception.types import Group, SamplingSpec
from tests import tiny_families
from tests.hf_reference import Reference
from tests.trainer import Trainer

SAMPLED = SamplingSpec(n=4, temperature=1.0, max_new_tokens=48)


def mismatch(group: Group, reference: Reference) -> float:
    """Mean |log-prob difference| of the sampled tokens."""
    found = []
    for trajectory in group.trajectories:
        (turn,) = trajectory.turns
        table = reference.logprobs(group.prompt, turn.token_ids, SAMPLED.temperature)
        found.append(np.abs(table[np.arange(len(turn.token_ids)), turn.token_ids] - turn.logprobs))
    return float(np.concatenate(found).mean())


@pytest.mark.asyncio
async def test_log_probs_are_those_of_transformers_before_and_after_an_update(shared_ray: None, tmp_path: Path) -> None:
    trainer = Trainer(replace(tiny_families.build("qwen3_5", tmp_path), dtype="bfloat16"))
    await trainer.pool.start()
    try:
        for seed in range(2):
            group = await trainer.pool.generate(trainer.reference.prompt(seed), SAMPLED)
            assert {span.version for t in group.trajectories for span in t.turns[0].versions} == {trainer.version}
            assert mismatch(group, trainer.reference) < LIMITS["bfloat16"] / 2
            await trainer.step()
            assert mismatch(group, trainer.reference) > 0.3, "the weights have changed"
    finally:
        await trainer.pool.shutdown()
