"""How long the engine stands still for new weights, against a plain copy of the same bytes by the same transport.

    python -m benchmarks.sync [--repeats 15] [--json] [overrides as for launch.train]
    python -m benchmarks.sync --json recipe=shape_3b                       # one GPU, CUDA IPC
    python -m benchmarks.sync --json placement.transport=gloo

Ours: real syncs from the DeepSpeed ranks into one idle vLLM engine, which is asked for no checksum. `pause_s` is from
asking vLLM to pause until it has resumed: what the engine sampled nothing in. `transfer_s` is what came before, while
it could sample: gathering, packing and handing over all buckets. `calls` counts the remote calls to the engine, and
`buckets` what they carried.

Rival, `copy_s`: the same buckets go the same way (controller, engine actor, vLLM's worker), where one call copies them
into a plain buffer that nobody uses; packing is not counted. `last_leg_s` is that one call alone. With gloo and NCCL it
also holds the wait for the last bucket. Both sides take turns; medians over the rounds after a warm-up.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from statistics import median
from typing import Any

import ray
import torch

from benchmarks.common import options, print_result
from launch.run.command_line import told
from launch.run.config import compose
from launch.run.prompts import read_policy_spec
from learner.pool import LearnerPool
from perception.config import Config
from rollout import pool
from rollout.engine import RolloutEngine
from rollout.pool import RolloutPool
from rollout.update import WeightUpdates
from runtime import cluster
from runtime.actors import ActorPool, Call, Limit
from runtime.placement import anywhere
from synthetic.prepare import prepare

COPY = Limit(600.0, "a constant of this benchmark")


class CopyingEngine(RolloutEngine):
    """An engine whose worker can also copy what it holds to where nobody looks."""

    async def start(self) -> Any:
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # lets a function through to the worker
        return await super().start()

    async def copy_held(self) -> None:
        await self._engine.collective_rpc(_copy_held)
        self._updates = WeightUpdates(self._engine, self._watch, self._config)


def _copy_held(wrapper: Any) -> None:
    worker = wrapper.worker
    plain = worker.__dict__.setdefault("plain_buffers", {})
    for number, flat in enumerate(arriving.result() for arriving, _ in worker._relook_inbox._held):
        device = next(worker.model_runner.get_model().parameters()).device
        plain.setdefault(number, torch.empty_like(flat, device=device)).copy_(flat)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    worker._relook_inbox.clear()


class CountingActors(ActorPool[RolloutEngine]):
    calls = 0

    async def each(self, *arguments: Any, **named: Any) -> list[Any]:
        self.calls += 1  # there is one engine
        return await super().each(*arguments, **named)


async def sync(learner: LearnerPool, engines: RolloutPool, version: int) -> dict[str, float]:
    assert isinstance(engines.actors, CountingActors)
    engines.actors.calls, buckets = 0, 0
    async for bucket in learner.buckets(engines.begin_update()):
        await engines.stage(bucket)
        buckets += 1
    (report,) = await engines.end_update(version)
    calls = engines.actors.calls
    await learner.release_buckets()
    return {
        "calls": calls,
        "buckets": buckets,
        "pause_s": report.pause_seconds,
        "transfer_s": report.transfer_seconds,
        "mbytes": report.nbytes / 1e6,
    }


async def copy(learner: LearnerPool, engines: RolloutPool) -> dict[str, float]:
    seconds = 0.0
    async for bucket in learner.buckets(engines.begin_update()):
        began = time.perf_counter()
        await engines.stage(bucket)
        seconds += time.perf_counter() - began
    began = time.perf_counter()
    copying: Call[RolloutEngine, None] = Call("copy_held", (), {})
    await engines.actors.each([copying], COPY)
    last_leg = time.perf_counter() - began
    await learner.release_buckets()
    return {"copy_s": seconds + last_leg, "last_leg_s": last_leg}


async def measure(config: Config, repeats: int) -> dict[str, float]:
    """Median of every figure of both sides."""
    policy = read_policy_spec(config.model)
    rollout = config.rollout
    seats = anywhere(config.placement, "engine", 1, rollout.tensor_parallel)
    engines = RolloutPool(policy, rollout, config.placement, seats)
    learner = LearnerPool(policy, config, anywhere(config.placement, "learner", config.learner.ranks))
    try:
        await asyncio.gather(engines.start(), learner.start())
        rounds = [
            await sync(learner, engines, version) | await copy(learner, engines) for version in range(repeats + 1)
        ]
    finally:
        await engines.shutdown()
        await learner.shutdown()
    return {name: round(median([one[name] for one in rounds[1:]]), 5) for name in rounds[0]}


def main() -> None:
    arguments = options(__doc__, overrides=True, repeats=(15, "rounds after the warm-up"))
    with told():
        config = compose(["recipe=quickstart", "rollout.engines=1", "run.name=sync", *arguments.overrides])
        prepare(config, say=lambda text: None)
    config = replace(config, learner=replace(config.learner, checksum=False))
    pool.RolloutEngine, pool.ActorPool = CopyingEngine, CountingActors  # type: ignore[misc, assignment]
    cluster.connect(config.placement)
    try:
        figures = asyncio.run(measure(config, arguments.repeats))
    finally:
        ray.shutdown()
    print_result(
        "sync",
        {"pause_s": figures["pause_s"]},
        {"copy_s": figures["copy_s"]},
        round(figures["pause_s"] / figures["copy_s"], 3),
        vars(arguments) | {"transport": config.placement.transport},
        **figures,
    )


if __name__ == "__main__":
    main()
