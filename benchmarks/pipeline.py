"""How long a step takes where rollouts run while the learner works, against one after the other.

    python -m benchmarks.pipeline [--steps 10] [--rounds 3] [--json]

A real training loop on simulated stages: pipeline, looking, pools, recorder and Ray actors with all their messages are
those of `launch.train`; engine, reward worker and learner rank sleep (`benchmarks/sleepers.py`), 3 : 1 : 2 units of 0.2
s for a step of 8 prompts. Ours: `pipeline.max_staleness=1`. Rival: 0, the synchronous loop. The two take turns. A
step's seconds are from the end of the one before to its own, recording included; medians over the steps after the
warm-up of all rounds. `controller_share` is what of a synchronous step is neither generation, scoring, learning nor
sync.
"""

from __future__ import annotations

import asyncio
import io
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import ray
from rich.console import Console

import learner.pool
import reward_workers.pool
import rollout.pool
from benchmarks.common import options, print_result
from benchmarks.sleepers import GENERATE, LEARN, PROMPTS, SCORE, UNIT_S, SleepingEngine, SleepingRank, SleepingWorker
from launch.record.progress import Progress
from launch.record.recorder import Recorder
from launch.run.checks import check_files, check_machine
from launch.run.command_line import told
from launch.run.config import compose
from launch.run.session import Session
from launch.run.state import RunState
from launch.run.system import Sync, System
from launch.train import train
from perception import metric_catalog as catalog
from perception.config import Config
from perception.types import Sample
from runtime import cluster
from runtime.actors import Call, Limit
from synthetic import world

WARM_UP = 2
"""Steps at the beginning: the first one fills the pipeline, the next one empties what it waited for."""
STAGES = [name for name in catalog.STAGES if name != catalog.SECONDS_CONTROLLER]
PATIENCE = Limit(60.0, "a constant of this benchmark")


class Simulated(System):
    """Its weights are a number, told to the engine by a message."""

    async def sync_weights(self, version: int) -> Sync:
        began = time.monotonic()
        self.version = version
        taking: Call[Any, None] = Call("take_weights", (version,), {})
        await self.engines.actors.each([taking], PATIENCE)
        return Sync(seconds=time.monotonic() - began, pause_seconds=0.0, transfer_seconds=0.0)


class Clock(Progress):
    """Notes what every step took, and its metrics."""

    def __init__(self, total_steps: int) -> None:
        super().__init__(total_steps, console=Console(file=io.StringIO()))
        self.ended: list[float] = []
        self.stages: list[float] = []

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.ended.append(time.monotonic())
        self.stages.append(sum(metrics[name] for name in STAGES))


@dataclass(slots=True)
class Side:
    seconds: list[float] = field(default_factory=list)
    """One per step after the warm-up."""
    shares: list[float] = field(default_factory=list)
    """The controller's share of each of them."""


async def play(config: Config, samples: Sequence[Sample], into: Side) -> None:
    """Train, and note what the steps took."""
    system, clock = Simulated(config), Clock(config.algorithm.steps)
    with Recorder(config) as recorder:
        state = RunState.start(config, samples)
        await system.start()
        try:
            await train(Session(config, samples, {}, state, system, recorder, clock))
        finally:
            for pool in (system.engines, system.rewards, system.learner):
                await pool.shutdown()
            system._reservation.free()
    for number in range(WARM_UP, config.algorithm.steps):
        seconds = clock.ended[number] - clock.ended[number - 1]
        into.seconds.append(seconds)
        into.shares.append(1 - clock.stages[number] / seconds)


def measure(folder: Path, steps: int, rounds: int) -> dict[int, Side]:
    """Both sides, by `pipeline.max_staleness`."""
    world.write(folder / "world", train=4 * PROMPTS, eval=2)
    settings = [
        "recipe=quickstart",
        f"algorithm.steps={steps}",
        f"algorithm.prompts_per_step={PROMPTS}",
        "learner.ranks=1",
        *(f"data.{split}={folder}/world/{split}.json" for split in ("train", "eval")),
        f"run.output={folder}",
        "run.name=pipeline",
        "wandb.mode=disabled",
    ]
    with told():
        config = compose(settings)
        check_machine(config, say=lambda text: None)
        samples, _ = check_files(config)
    sides = {0: Side(), 1: Side()}
    rollout.pool.RolloutEngine = SleepingEngine  # type: ignore[assignment, misc]
    reward_workers.pool.RewardWorker = SleepingWorker  # type: ignore[assignment, misc]
    learner.pool.LearnerRank = SleepingRank  # type: ignore[assignment, misc]
    cluster.connect(config.placement)
    try:
        for number in range(rounds):
            for staleness in (0, 1) if number % 2 else (1, 0):
                pipeline = replace(config.pipeline, max_staleness=staleness)
                asyncio.run(play(replace(config, pipeline=pipeline), samples, sides[staleness]))
    finally:
        ray.shutdown()
    return sides


def main() -> None:
    arguments = options(__doc__, steps=(10, "of training, warm-up included"), rounds=(3, "of both"))
    with tempfile.TemporaryDirectory() as folder:
        sides = measure(Path(folder), arguments.steps, arguments.rounds)
    ours, rival = (median(sides[staleness].seconds) for staleness in (1, 0))
    print_result(
        "pipeline",
        {"step_s": round(ours, 4)},
        {"step_s": round(rival, 4)},
        round(ours / rival, 3),
        vars(arguments) | {"prompts": PROMPTS, "unit_s": UNIT_S, "units": [GENERATE, SCORE, LEARN]},
        controller_share=round(median(sides[0].shares), 4),
    )


if __name__ == "__main__":
    main()
