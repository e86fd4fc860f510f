"""What second looks cost a training step: its seconds and tokens with look=relook against look=none.

    python -m benchmarks.look_steps [--steps 5] [--rounds 3] [--json] [overrides as for launch.train]

Real training steps of `launch.train`, all with the same workers: blocks of look=none and look=relook, each with
`pipeline.max_staleness` 0 and 1, take turns in every round. A step's seconds are from the end of the one before to its
own, recording included; a block's first step, which fills the pipeline, and its last, which finds it empty, are left
out. The learning rate is tiny, so that all sides sample from the same policy. `step_ratio` is the median over the
rounds of relook's mean step over none's in the same round, `interval` the 95 % t-interval of the rounds' mean,
`token_ratio` that of all tokens that the samples' rows hold, `computed_ratio` that of those with each prompt once per
group, as engine and learner compute them. CPU seconds are of all processes of a role, per step: what
a ratio is made of. They suffer less from a busy machine.
"""

from __future__ import annotations

import asyncio
import io
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from statistics import median
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from scipy import stats

from benchmarks.common import options, print_result
from benchmarks.look import prompt_tokens, row_tokens
from launch.record.progress import Progress
from launch.record.recorder import Recorder
from launch.run.calibrate import calibrate
from launch.run.checks import check_files
from launch.run.command_line import told
from launch.run.config import compose
from launch.run.prompts import PromptMaker
from launch.run.session import Session
from launch.run.state import RunState
from launch.run.system import System
from launch.train import train
from perception.config import Config, LookMode
from perception.types import Group, Sample
from runtime import cluster
from runtime.actors import ActorPool
from synthetic.prepare import prepare

SIDES: tuple[tuple[LookMode, int], ...] = tuple(product(("none", "relook"), (0, 1)))


class Clock(Progress):
    """Notes when every step ended, and the CPU seconds of every role until then."""

    def __init__(self, roles: Mapping[str, Sequence[psutil.Process]]) -> None:
        super().__init__(0, console=Console(file=io.StringIO()))
        self._roles = roles
        self.ended: list[float] = []
        self.cpu: list[dict[str, float]] = []

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.ended.append(time.monotonic())
        self.cpu.append({role: sum(map(_cpu, found)) for role, found in self._roles.items()})


class Tokens(Recorder):
    """Counts the tokens of every step's rows, and those with each prompt once per group. Per sample."""

    def __init__(self, config: Config, prompts: PromptMaker) -> None:
        super().__init__(config)
        self._prompts = prompts
        self.of_steps: list[tuple[float, float]] = []

    def step(self, step: int, metrics: Mapping[str, float], groups: Sequence[Group]) -> None:
        super().step(step, metrics, groups)
        rows, again = 0, 0
        for group in groups:
            rows += sum(row_tokens(one, self._prompts) for one in group.trajectories)
            again += (len(group.trajectories) - 1) * prompt_tokens(group.prompt, self._prompts)
        samples = sum(len(group.trajectories) for group in groups)
        self.of_steps.append((rows / samples, (rows - again) / samples))


@dataclass(slots=True)
class Side:
    """One entry per round: means over its steps."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)
    """All, computed."""
    cpu: list[dict[str, float]] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        roles = {role: round(median(one[role] for one in self.cpu), 2) for role in self.cpu[0]}
        every, computed = np.median(self.tokens, axis=0).round(1).tolist()
        seconds = round(median(self.seconds), 3)
        return {"step_s": seconds, "tokens": every, "computed_tokens": computed, "cpu_s": roles}


async def measure(config: Config, train_on: Sequence[Sample], steps: int, rounds: int) -> dict[Any, Side]:
    """Every side's figures, by (look, max_staleness)."""
    system, prompts = System(config), PromptMaker(config.model, config.task)
    state, sides = RunState.start(config, train_on), {side: Side() for side in SIDES}
    try:
        await system.start()
        await calibrate(system, train_on)
        roles = await _processes(system)
        for number in range(rounds + 1):  # round 0 warms everything up
            for side in SIDES if number % 2 else reversed(SIDES):
                into = sides[side] if number else Side()
                await _block(system, state, side, steps, prompts, Clock(roles), into)
    finally:
        await system.shutdown()
    return sides


async def _block(
    system: System,
    state: RunState,
    side: tuple[LookMode, int],
    steps: int,
    prompts: PromptMaker,
    clock: Clock,
    into: Side,
) -> None:
    config, (mode, staleness) = system.config, side
    system.config = replace(
        config,
        algorithm=replace(config.algorithm, steps=state.step + steps),
        look=replace(config.look, mode=mode),
        pipeline=replace(config.pipeline, max_staleness=staleness),
    )
    with Tokens(system.config, prompts) as recorder:
        await train(Session(system.config, (), {}, state, system, recorder, clock, checked=True))
    into.seconds.append((clock.ended[-2] - clock.ended[0]) / (steps - 2))
    into.tokens.append(np.mean(recorder.of_steps[1:-1], axis=0))
    first, last = clock.cpu[0], clock.cpu[-2]
    into.cpu.append({role: (last[role] - first[role]) / (steps - 2) for role in first})


async def _processes(system: System) -> dict[str, list[psutil.Process]]:
    """The processes of every role."""
    pools: dict[str, ActorPool[Any]] = {
        "engine": system.engines.actors,
        "reward": system.rewards.actors,
        "learner": system.learner.actors,
    }
    found = {"controller": [psutil.Process()]}
    for role, pool in pools.items():
        own = [slot.actor.__ray_call__.remote(lambda actor: os.getpid()) for slot in pool.slots]
        actors = [psutil.Process(pid) for pid in await asyncio.gather(*own)]
        found[role] = [one for actor in actors for one in (actor, *actor.children(recursive=True))]
    return found


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def compared(sides: Mapping[Any, Side], staleness: int) -> dict[str, float]:
    """relook over none, by round."""
    ours, rival = sides["relook", staleness], sides["none", staleness]
    ratios = np.array(ours.seconds) / np.array(rival.seconds)
    spread = float(stats.sem(ratios) * stats.t.ppf(0.975, len(ratios) - 1)) if len(ratios) > 1 else float("inf")
    every, computed = np.median(np.array(ours.tokens) / np.array(rival.tokens), axis=0).round(3).tolist()
    cpu = [sum(one.values()) / sum(other.values()) for one, other in zip(ours.cpu, rival.cpu, strict=True)]
    return {
        "step_ratio": round(float(np.median(ratios)), 3),
        "interval": round(spread, 3),
        "token_ratio": every,
        "computed_ratio": computed,
        "cpu_ratio": round(median(cpu), 3),
    }


def main() -> None:
    arguments = options(__doc__, overrides=True, steps=(5, "of a block"), rounds=(3, "of all blocks"))
    with tempfile.TemporaryDirectory() as output:
        own = ["recipe=quickstart", "look=relook", "learner.lr=1e-7", "run.name=look_steps", "wandb.mode=disabled"]
        with told():
            config = compose([*own, f"run.output={output}", *arguments.overrides])
            prepare(config, say=lambda text: None)
            samples, _ = check_files(config)
        cluster.connect(config.placement)
        sides = asyncio.run(measure(config, samples, arguments.steps, arguments.rounds))
    figures = {f"{mode}, {staleness}": side.figures() for (mode, staleness), side in sides.items()}
    ratios = {staleness: compared(sides, staleness) for staleness in (0, 1)}
    ours, rival = figures["relook, 1"], figures["none, 1"]
    print_result("look_steps", ours, rival, ratios[1]["step_ratio"], vars(arguments), sides=figures, compared=ratios)


if __name__ == "__main__":
    main()
