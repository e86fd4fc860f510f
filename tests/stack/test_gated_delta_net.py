"""Qwen3.5 in a real engine."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from perception.types import Group, SamplingSpec
from tests import tiny_families
from tests.trainer import Trainer

SAMPLED = SamplingSpec(n=4, temperature=1.0, max_new_tokens=48)
pytestmark = pytest.mark.asyncio(loop_scope="module")


def mismatch(trainer: Trainer, group: Group) -> float:
    differences = []
    for trajectory in group.trajectories:
        (turn,) = trajectory.turns
        assert {span.version for span in turn.versions} == {trainer.version}
        table = trainer.reference.logprobs(group.prompt, turn.token_ids, 1.0)
        differences.append(np.abs(table[np.arange(len(turn.token_ids)), turn.token_ids] - turn.logprobs))
    d = np.concatenate(differences)
    print(len(d), d.mean(), d.max())
    return float(d.mean())


async def test_x(shared_ray: None, tmp_path: Path) -> None:
    t = time.time()
    trainer = Trainer(replace(tiny_families.build("qwen3_5", tmp_path), dtype="bfloat16"))
    await trainer.pool.start()
    print("start", time.time() - t)
    try:
        for version in range(3):
            group = await trainer.pool.generate(trainer.reference.prompt(version), SAMPLED)
            print(version, mismatch(trainer, group))
            await trainer.step()
            trainer.version -= 1
            try:
                print("stale", mismatch(trainer, group))
            finally:
                trainer.version += 1
    finally:
        await trainer.pool.shutdown()
    print("end", time.time() - t)
