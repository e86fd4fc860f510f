"""Dynamic sampling, KL in the reward, failures and steps that learn nothing, through the real loop: real pipeline,
cursor, rank store and recorder, invented workers. And the published algorithms as presets.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from launch.record import run_directory
from launch.record.progress import Progress
from launch.record.recorder import Recorder
from launch.run.batch import next_batch
from launch.run.config import CONF, compose
from launch.run.session import Session
from launch.run.state import RunState
from launch.run.system import Sync
from launch.train import train
from perception import metric_catalog as catalog
from perception.config import AlgorithmConfig, Config
from perception.errors import UserError
from perception.types import FailureKind, Group, ImageSource, LearnerReport, Prompt, Sample, Span, Work
from tests import builders
from tests.builders import changed, group, lost, measured, noise, sample, turn

N = 8
Teaches = Callable[[int], bool]
"""By how many groups were sampled before it: whether a group's rewards differ."""


class World:
    """A system whose workers answer at once."""

    def __init__(self, settings: Config, teaches: Teaches, fails: Teaches = lambda _: False) -> None:
        self.config, self.teaches, self.fails = settings, teaches, fails
        self.asked: list[Prompt] = []
        self.learned: list[Sequence[Group]] = []
        self.kl_asked = 0
        self.report: dict[str, float] = {catalog.OPTIMIZER_STEPS: 1.0}
        self.version = 0
        self.looking: Any = self
        self.learner: Any = self

    def look_state(self, explore: bool) -> None:
        """One pass."""

    def prompt(self, asked: Sample, step: int, place: int) -> Prompt:
        return builders.prompt(asked, seed=1000 * step + place)

    async def rollout(self, prompt: Prompt, asked: Any, want_masks: bool) -> Group:
        place = len(self.asked)
        self.asked.append(prompt)
        if self.fails(place):
            return group(*[lost(FailureKind.SCORER, "timed out")] * N, about=prompt)
        spread = 0.5 if self.teaches(place) else 0.0
        made = (measured(mask_iou=0.1 + spread * (i % 2), parsed=1.0, point_score=0.5) for i in range(N))
        said = turn("<answer>[]</answer>", range(5), version=self.version)
        return group(*(replace(one, turns=(said,)) for one in made), about=prompt)

    async def update(self, groups: Sequence[Group]) -> LearnerReport:
        self.learned.append(groups)
        return LearnerReport(metrics=self.report, seconds=0.0)

    async def parity(self, groups: Sequence[Group]) -> dict[str, float]:
        return {catalog.LOGPROB_MISMATCH: 0.0, catalog.LOGPROB_MISMATCH_MAX: 0.0, catalog.RATIO: 1.0}

    async def with_kl(self, groups: Sequence[Group]) -> list[Group]:
        self.kl_asked += len(groups)
        return [
            replace(one, trajectories=tuple(replace(each, kl=0.25 * each.index) for each in one.trajectories))
            for one in groups
        ]

    def worked(self) -> list[Work]:
        return []

    async def save(self, folder: str) -> dict[str, str]:
        return {}

    async def sync_weights(self, version: int) -> Sync:
        self.version = version
        return Sync(seconds=0.0, pause_seconds=0.0, transfer_seconds=0.0)


def settings_of(output: Path, **algorithm: Any) -> Config:
    plain = changed(builders.config(output), "run", rollouts_kept=100)
    plain = replace(plain, reward=replace(plain.reward, rank="ecdf"))
    return replace(plain, algorithm=AlgorithmConfig(steps=2, prompts_per_step=4, group_size=N, **algorithm))


@pytest.fixture(autouse=True)
def no_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none to be measured for a checkpoint."""
    monkeypatch.setattr("launch.run.memory.measure", lambda *_: SimpleNamespace(parameters=1, trained=1))


def samples(folder: Path) -> list[Sample]:
    path = folder / "image.png"
    Image.fromarray(noise(0)).save(path)
    return [sample(f"scene-{i}", image=ImageSource(path=str(path))) for i in range(64)]


def play(world: World, folder: Path) -> tuple[RunState, list[dict[str, Any]]]:
    """The training loop, recorded; the run's state and its steps' metrics."""
    questions = samples(folder)
    state = RunState.start(world.config, questions)
    progress = Progress(2, console=Console(file=io.StringIO()))
    with Recorder(world.config) as recorder:
        session = Session(world.config, questions, {}, state, world, recorder, progress)  # type: ignore[arg-type]
        asyncio.run(train(session))
        return state, run_directory.read_lines(recorder.run_dir / run_directory.METRICS)


def run(tmp_path: Path, teaches: Teaches, **algorithm: Any) -> tuple[World, RunState, list[dict[str, Any]]]:
    """Two steps of four prompts over 64 samples; their metrics."""
    world = World(settings_of(tmp_path, **algorithm), teaches)
    return world, *play(world, tmp_path)


def test_refill_samples_further_prompts_until_enough_groups_teach(tmp_path: Path) -> None:
    # Places 1, 4, 5 of the first step teach nothing: 4 prompts, 1 in their stead, 1 again, 1 again; then 4 at once.
    world, state, metrics = run(tmp_path, lambda place: place not in (1, 4, 5), dynamic="refill")
    assert [m[catalog.SAMPLING_ROUNDS] for m in metrics] == [4, 1]
    assert [m[catalog.GROUPS_TRAINED] for m in metrics] == [4, 4]
    assert [m[catalog.ZERO_VARIANCE] for m in metrics] == [3 / 7, 0]
    assert [len(groups) for groups in world.learned] == [4, 4]
    assert all(one.teaches for groups in world.learned for one in groups)
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
    for one in (one for groups in world.learned for one in groups):
        assert [each.advantage for each in one.trajectories] == pytest.approx(expected)
    tokens = sum(each.sampled_tokens for one in world.learned[0] for each in one.trajectories)
    assert metrics[0][catalog.KL] == pytest.approx(4 * 0.25 * 28 / tokens)  # 0 + 1 + .. + 7 = 28


def test_no_kl_is_asked_for_unless_it_belongs_in_the_reward(tmp_path: Path) -> None:
    world, _, metrics = run(tmp_path, lambda _: True, kl_coef=0.1)
    assert world.kl_asked == 0 and catalog.KL not in metrics[0]


def test_failures_are_judged_over_the_whole_step(tmp_path: Path) -> None:
    """A refill round of one failed group is no reason to stop; half a step that failed is."""
    settings = settings_of(tmp_path, dynamic="refill")

    def go(fails: Teaches) -> World:
        world = World(settings, lambda place: place != 0, fails)
        play(world, tmp_path)
        return world

    assert sum(one.teaches for one in go(lambda place: place == 4).learned[0]) == 4
    with pytest.raises(UserError, match="24 of 32 answers of the step failed"):
        go(lambda place: place in (1, 2, 3))


def test_a_step_that_learned_nothing_ends_the_run_with_one_line(tmp_path: Path) -> None:
    """No optimizer step was taken: loss or gradient norm were not finite. Nothing of the step is recorded."""
    world = World(settings_of(tmp_path), lambda _: True)
    world.report = {catalog.OPTIMIZER_STEPS: 0.0, catalog.SKIPPED: 1.0, catalog.LOSS: float("nan")}
    with pytest.raises(
        UserError, match=r"^step 1: loss or gradient norm is not finite, the weights were left"
    ) as error:
        play(world, tmp_path)
    assert "\n" not in str(error.value)
    assert run_directory.read_lines(tmp_path / "quickstart" / run_directory.METRICS) == []


def test_a_step_of_which_some_updates_were_skipped_goes_on_and_says_so(tmp_path: Path) -> None:
    world = World(settings_of(tmp_path), lambda _: True)
    world.report = {catalog.OPTIMIZER_STEPS: 1.0, catalog.SKIPPED: 1.0}
    _, metrics = play(world, tmp_path)
    assert [row[catalog.SKIPPED] for row in metrics] == [1.0, 1.0] and [row["step"] for row in metrics] == [1, 2]


class Rounds:
    """Stands for the pipeline: hands over prepared groups. A take lasts 6 s of this clock; what it takes was sampled
    `sampled` seconds after it began."""

    def __init__(self, *rounds: Sequence[Group], sampled: float = 4.0) -> None:
        self._rounds, self._sampled, self._now = iter(rounds), sampled, 100.0
        self.asked: list[tuple[int, int]] = []

    def monotonic(self) -> float:
        return self._now

    async def take(self, n: int, step: int) -> list[Group]:
        self.asked.append((n, step))
        sampling = Span(began=self._now - 50.0, ended=self._now + self._sampled)
        self._now += 6.0
        return [replace(one, sampling=sampling) for one in next(self._rounds)]


def of_rewards(*rewards: float) -> Group:
    return group(*(measured(mask_iou=value, parsed=0.0, point_score=0.0) for value in rewards))


async def test_rounds_add_up_in_prompt_order(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, dynamic="refill", kl_coef=0.5, kl_in="reward", scale="none")
    settings = changed(changed(settings, "algorithm", prompts_per_step=2), "reward", rank="none")
    scored = Rounds([of_rewards(1.0, 1.0), of_rewards(0.0, 1.0)], [of_rewards(1.0, 2.0)])

    class Kl:
        async def with_kl(self, groups: Sequence[Group]) -> list[Group]:
            return [
                replace(one, trajectories=tuple(replace(each, kl=2.0) for each in one.trajectories)) for one in groups
            ]

    batch = await next_batch(scored, 7, settings, Kl(), None)  # type: ignore[arg-type]
    assert scored.asked == [(2, 7), (1, 7)] and batch.rounds == 2
    # every reward less 0.5 * 2
    assert [[one.reward for one in each.trajectories] for each in batch.groups] == [[0, 0], [-1, 0], [0, 1]]
    assert [[one.advantage for one in each.trajectories] for each in batch.teaching] == [[-0.5, 0.5]] * 2


@pytest.mark.parametrize(
    ("sampled", "generate", "score"),
    [(4.0, 12.0, 6.0), (0.0, 0.0, 18.0), (-3.0, 0.0, 18.0), (6.0, 18.0, 0.0), (7.0, 18.0, 0.0)],
)
async def test_a_steps_waits_add_up_over_its_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampled: float, generate: float, score: float
) -> None:
    """Scoring overlaps sampling: what was waited until all were sampled is generation, the rest scoring; what was
    done before the step asked counts nothing."""
    settings = changed(settings_of(tmp_path, dynamic="refill"), "algorithm", prompts_per_step=1)
    settings = changed(settings, "reward", rank="none")
    scored = Rounds([of_rewards(1.0, 1.0)], [of_rewards(1.0, 1.0)], [of_rewards(0.0, 1.0)], sampled=sampled)
    monkeypatch.setattr("launch.run.batch.time", scored)
    batch = await next_batch(scored, 1, settings, None, None)  # type: ignore[arg-type]
    assert (batch.rounds, batch.began) == (3, 100.0)
    assert batch.seconds == {"generate": generate, "score": score, "learn": 0.0}


@pytest.mark.parametrize(
    ("name", "differs"),
    [
        ("grpo", {}),
        ("dapo", {"clip_high": 0.28, "dynamic": "refill"}),
        ("dr_grpo", {"aggregate": "constant", "scale": "none"}),
        ("gspo", {"loss": "gspo", "aggregate": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}),
        ("cispo", {"loss": "cispo", "clip_low": 1.0, "clip_high": 4.0, "dynamic": "refill"}),
    ],
)
def test_a_preset_changes_what_its_paper_says_and_nothing_else(name: str, differs: dict[str, Any]) -> None:
    assert preset(name) == replace(preset("grpo"), **differs)


@cache
def preset(name: str) -> AlgorithmConfig:
    return compose(["recipe=quickstart", f"algorithm={name}"]).algorithm


def test_every_preset_is_known_here() -> None:
    assert {path.stem for path in (CONF / "algorithm").glob("*.yaml")} == {"grpo", "dapo", "dr_grpo", "gspo", "cispo"}
