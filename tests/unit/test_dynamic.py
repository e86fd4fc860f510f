"""Dynamic sampling and KL in the reward, through the real loop: real cursor, rank store and recorder, invented workers.

And the published algorithms as presets.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from launch.record import run_directory
from launch.record.progress import Progress
from launch.record.recorder import Recorder
from launch.run.batch import StepBatch
from launch.run.config import CONF, compose
from launch.run.state import RunState
from launch.run.step_metrics import StageClock
from launch.run.system import System
from launch.train import Session, train
from perception import metric_catalog as catalog
from perception.config import AlgorithmConfig, Config
from perception.errors import UserError
from perception.types import (
    Failure,
    FailureKind,
    Group,
    LearnerReport,
    Prompt,
    ScoredGroup,
    TrainGroup,
    UpdateReport,
)
from tests.fake_run import N, config, scored_group

Teaches = Callable[[int], bool]
"""By how many groups were sampled before it: whether a group's rewards differ."""


class World(System):
    """A system whose workers answer at once; prompts come from the real method."""

    def __init__(self, settings: Config, folder: Path, teaches: Teaches, fails: Teaches = lambda _: False) -> None:
        self.config, self.folder, self.teaches, self.fails = settings, folder, teaches, fails
        self.asked: list[Prompt] = []
        self.learned: list[Sequence[TrainGroup]] = []
        self.kl: list[tuple[float, ...]] = []
        self.version = 0
        maker: Any = SimpleNamespace(prompt=self._prompt)
        images: Any = SimpleNamespace(handle=lambda sample: None)
        learner: Any = SimpleNamespace(
            train_step=self._learn, parity=self._parity, kl=self._kl, save_checkpoint=_nothing
        )
        self._prompts, self._images, self.learner = maker, images, learner

    def _prompt(self, sample: Any, image: None, seed: int, inline: bool) -> Prompt:
        return Prompt(sample=sample, token_ids=(1,), images=(), answer_height=112, answer_width=112, seed=seed)

    async def answer(self, prompts: Sequence[Prompt], sampling: Any, **options: Any) -> list[ScoredGroup]:
        options["on_sampled"].set()
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt: Prompt) -> ScoredGroup:
        place = len(self.asked)
        self.asked.append(prompt)
        entry = scored_group(self.folder, int(prompt.sample.id.split("-")[1]), 5.0, np.random.default_rng(prompt.seed))
        failure = Failure(kind=FailureKind.SCORER, detail="timed out") if self.fails(place) else None
        spread = 0.5 if self.teaches(place) else 0.0
        scores = tuple(
            replace(s, failure=failure, metrics={"mask_iou": 0.1 + spread * (i % 2), "parsed": 1.0, "point_score": 0.5})
            for i, s in enumerate(entry.scores)
        )
        group = replace(entry.group, prompt=replace(entry.group.prompt, seed=prompt.seed))
        return replace(entry, group=group, scores=scores)

    async def _learn(self, groups: Sequence[TrainGroup]) -> LearnerReport:
        self.learned.append(groups)
        return LearnerReport(metrics={}, seconds=0.0)

    async def _parity(self, groups: Sequence[Group]) -> dict[str, float]:
        return {
            catalog.LOGPROB_MISMATCH: 0.0,
            catalog.LOGPROB_MISMATCH_MAX: 0.0,
            catalog.RATIO: 1.0,
        }

    async def _kl(self, groups: Sequence[Group]) -> list[tuple[float, ...]]:
        found = [tuple(0.25 * i for i in range(N)) for _ in groups]
        self.kl += found
        return found

    async def sync_weights(self, version: int) -> list[UpdateReport]:
        return [UpdateReport(version=version, transfer_seconds=0.0, pause_seconds=0.0, nbytes=0)]


async def _nothing(*arguments: Any) -> None:
    """Nothing to save."""


def settings_of(output: Path, **algorithm: Any) -> Config:
    whole = config(output)
    return replace(
        whole,
        run=replace(whole.run, rollouts_kept=100),
        reward=replace(whole.reward, rank="ecdf", max_failure_rate=0.5),
        algorithm=AlgorithmConfig(steps=2, prompts_per_step=4, group_size=N, **algorithm),
    )


def run(tmp_path: Path, teaches: Teaches, **algorithm: Any) -> tuple[World, RunState, list[dict[str, Any]]]:
    """Two steps of four prompts over 64 scenes; their metrics."""
    world = World(settings_of(tmp_path, **algorithm), tmp_path, teaches)
    rng = np.random.default_rng(0)
    samples = [scored_group(tmp_path, seed, 5.0, rng).group.prompt.sample for seed in range(64)]
    state = RunState.fresh(world.config, samples)
    progress = Progress(2, console=Console(file=io.StringIO()))
    with Recorder(world.config) as recorder:
        asyncio.run(train(Session(world.config, samples, {}, state, world, recorder, progress, asyncio.Event())))
        return world, state, run_directory.read_lines(recorder.run_dir / run_directory.METRICS)


def test_refill_samples_further_prompts_until_enough_groups_teach(tmp_path: Path) -> None:
    # Places 1, 4, 5 of the first step teach nothing: 4 prompts, 1 in their stead, 1 again, 1 again; then 4 at once.
    world, state, metrics = run(tmp_path, lambda place: place not in (1, 4, 5), dynamic="refill")
    assert [m[catalog.SAMPLING_ROUNDS] for m in metrics] == [4, 1]
    assert [m[catalog.GROUPS_TRAINED] for m in metrics] == [4, 4]
    assert [m[catalog.ZERO_VARIANCE] for m in metrics] == [3 / 7, 0]
    assert [len(groups) for groups in world.learned] == [4, 4]
    assert all(any(group.advantages) for groups in world.learned for group in groups)
    assert len({p.seed for p in world.asked}) == len({p.sample.id for p in world.asked}) == 11 == state.cursor.position
    stored = state.ranks.state() if state.ranks else None
    assert stored and set(stored.steps.values()) == {2} and sum(map(len, stored.rows.values())) == 11 * N
    recorded = pq.read_table(sorted((tmp_path / "quickstart/rollouts").glob("train-*"))[0]).to_pylist()
    assert len(recorded) == 7 * N and len({row["sample_id"] for row in recorded}) == 7
    again, _, _ = run(tmp_path, lambda place: place not in (1, 4, 5), dynamic="refill")
    assert [p.seed for p in again.asked] == [p.seed for p in world.asked]


def test_refill_gives_up_after_its_rounds_and_learns_from_what_there_is(tmp_path: Path) -> None:
    world, _, metrics = run(tmp_path, lambda place: place == 2, dynamic="refill", dynamic_rounds=3)
    assert len(world.asked) == (4 + 3 + 3) + (4 + 4 + 4)
    assert [m[catalog.SAMPLING_ROUNDS] for m in metrics] == [3, 3]
    assert [len(groups) for groups in world.learned] == [1, 12]  # nothing taught in the second step: all are kept


@pytest.mark.parametrize(("dynamic", "learned"), [("none", [4, 4]), ("drop", [2, 3])])
def test_one_round_keeps_or_drops_the_groups_that_teach_nothing(
    tmp_path: Path, dynamic: str, learned: list[int]
) -> None:
    world, _, metrics = run(tmp_path, lambda place: place not in (0, 3, 6), dynamic=dynamic)
    assert [len(groups) for groups in world.learned] == learned
    assert [m[catalog.ZERO_VARIANCE] for m in metrics] == [0.5, 0.25]
    assert [m[catalog.SAMPLING_ROUNDS] for m in metrics] == [1, 1]


def test_kl_is_taken_from_the_reward_before_the_advantages(tmp_path: Path) -> None:
    world, _, metrics = run(tmp_path, lambda _: False, scale="none", kl_coef=0.1, kl_in="reward", dynamic="drop")
    # Equal rewards less 0.1 * (0, 0.25, .. 1.75), whose mean is 0.875: what is left is the KL alone.
    expected = [0.1 * (0.875 - 0.25 * i) for i in range(N)]
    assert [len(groups) for groups in world.learned] == [4, 4]
    for groups in world.learned:
        for entry in groups:
            assert entry.advantages == pytest.approx(expected)
    tokens = sum(t.sampled_tokens for entry in world.learned[0] for t in entry.group.trajectories)
    assert metrics[0][catalog.KL] == pytest.approx(4 * 0.25 * 28 / tokens)  # 0 + 1 + .. + 7 = 28


def test_no_kl_is_asked_for_unless_it_belongs_in_the_reward(tmp_path: Path) -> None:
    world, _, metrics = run(tmp_path, lambda _: True, kl_coef=0.1)
    assert world.kl == [] and catalog.KL not in metrics[0]


def test_failures_are_judged_over_the_whole_step(tmp_path: Path) -> None:
    """A refill round of one failed group is no reason to stop; half a step that failed is."""
    settings = settings_of(tmp_path, dynamic="refill")
    rng = np.random.default_rng(0)
    samples = [scored_group(tmp_path, seed, 5.0, rng).group.prompt.sample for seed in range(64)]

    def go(fails: Teaches) -> World:
        world = World(settings, tmp_path, lambda place: place != 0, fails)
        progress = Progress(2, console=Console(file=io.StringIO()))
        with Recorder(settings) as recorder:
            state = RunState.fresh(settings, samples)
            asyncio.run(train(Session(settings, samples, {}, state, world, recorder, progress, asyncio.Event())))
        return world

    assert len(go(lambda place: place == 4).learned[0]) == 4
    with pytest.raises(UserError, match="24 of 32 answers of the step failed"):
        go(lambda place: place in (1, 2, 3))


def test_the_clock_adds_up_the_rounds_of_a_step() -> None:
    async def step() -> dict[str, float]:
        clock = StageClock()
        for _ in range(3):
            with clock.generate_and_score() as sampled:
                await asyncio.sleep(0.02)
                sampled.set()
                await asyncio.sleep(0.04)
        return clock.seconds()

    seconds = asyncio.run(step())
    assert seconds[catalog.SECONDS_GENERATE] >= 3 * 0.02 and seconds[catalog.SECONDS_SCORE] >= 3 * 0.039
    assert seconds[catalog.SECONDS_CONTROLLER] < 0.02


def test_rounds_add_up_in_prompt_order(tmp_path: Path) -> None:
    groups = [scored_group(tmp_path, seed, 5.0, np.random.default_rng(seed)) for seed in range(3)]
    algorithm = AlgorithmConfig(steps=1, prompts_per_step=2, group_size=N, dynamic="refill", kl_coef=0.5)
    batch = StepBatch(algorithm)
    assert batch.missing == 2
    batch.add(groups[:2], [(1.0,) * N, (0.0, 1.0) * (N // 2)], ())
    assert batch.missing == 1
    batch.add(groups[2:], [(1.0, 2.0) * (N // 2)], [(2.0,) * N])
    assert batch.missing == 0 and batch.scored == groups
    assert batch.rewards[2] == (0.0, 1.0) * (N // 2)  # 1 - 0.5 * 2, 2 - 0.5 * 2


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("grpo", {}),
        ("dapo", {"clip_high": 0.28, "dynamic": "refill"}),
        ("dr_grpo", {"aggregate": "constant", "scale": "none"}),
        ("gspo", {"loss": "gspo", "aggregate": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}),
        ("cispo", {"loss": "cispo", "clip_low": 1.0, "clip_high": 4.0, "dynamic": "refill"}),
    ],
)
def test_a_preset_changes_what_its_paper_says_and_nothing_else(name: str, changed: dict[str, Any]) -> None:
    grpo = compose(["recipe=quickstart"]).algorithm
    assert compose(["recipe=quickstart", f"algorithm={name}"]).algorithm == replace(grpo, **changed)


def test_every_preset_is_known_here() -> None:
    assert {path.stem for path in (CONF / "algorithm").glob("*.yaml")} == {"grpo", "dapo", "dr_grpo", "gspo", "cispo"}
