"""Guards that nobody waits who need not: looks begin while first answers are still sampled, and examinations overtake
scores. Engine and reward worker are scripted; looking, the loop and the reward pool are real."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from launch.run import looking
from launch.run.looking import Asked, Looking
from perception.config import LookConfig, ModelConfig, PipelineConfig, PlacementConfig, RewardConfig
from perception.types import FailureKind, Feed, Finding, Group, LookState, Prompt, SamplingSpec, Trajectory, Turn, View
from reward_workers.pool import RewardPool
from runtime.actors import Call, Late, Limit
from runtime.placement import anywhere
from tests import builders
from tests.builders import failure, group, sample, trajectory

STATE = LookState(weights=(), threshold=0, explore=0)
ASKED = Asked(sampling=SamplingSpec(n=3, temperature=1.0, max_new_tokens=9), look=STATE)
IMAGE = builders.noise_image(0)
PICTURE = b"a picture"
AGAIN = Finding(confidence=0.1, view=(10, 20, 60, 70), picture=PICTURE)


def asked(name: str) -> Prompt:
    return builders.prompt(sample(name), images=(IMAGE,))


async def idle() -> None:
    """Long enough for everything that can go on to have gone on."""
    for _ in range(30):
        await asyncio.sleep(0)


class Script:
    """Stands for engines, reward pool and prompts. An answer is ready once `done` has been told so; every answer of a
    first pass is doubtful."""

    def __init__(self, ahead: bool) -> None:
        self.running: list[str] = []
        self._ready: dict[str, asyncio.Event] = {}
        self.examined: list[list[int]] = []
        self.fed: list[Feed] = []
        script: Any = self
        config = builders.config(look=LookConfig(mode="relook"), pipeline=PipelineConfig(max_staleness=int(ahead)))
        self.looking = Looking(script, script, script, config)

    def done(self, *names: str) -> None:
        for name in names:
            self._event(name).set()

    def _event(self, name: str) -> asyncio.Event:
        return self._ready.setdefault(name, asyncio.Event())

    async def sample(
        self, prompt: Prompt, index: int, turns: tuple[Turn, ...], feed: Feed | None, sampling: SamplingSpec
    ) -> Trajectory:
        name = f"{prompt.sample.id}{index}.{len(turns)}"
        if feed is not None:
            self.fed.append(feed)
        self.running.append(name)
        await self._event(name).wait()
        self.running.remove(name)
        return trajectory(*turns, builders.turn(name), index=index)

    async def generate(self, prompt: Prompt, sampling: SamplingSpec) -> Group:
        every = [self.sample(prompt, index, (), None, sampling) for index in range(sampling.n)]
        return group(*await asyncio.gather(*every), about=prompt)

    async def examine(self, one: Group, look: LookState) -> list[Finding]:
        self.examined.append([each.index for each in one.trajectories])
        return [AGAIN for _ in one.trajectories]

    async def score(self, one: Group, want_masks: bool, held_out: bool, look: LookState | None) -> Group:
        return one

    def view(self, rect: Any, height: int, width: int) -> View:
        return builders.view(*rect)

    def again(self, task: str) -> tuple[int, ...]:
        return (7,)


async def test_a_look_begins_while_its_siblings_are_still_sampled() -> None:
    script = Script(ahead=False)
    rollout = asyncio.create_task(script.looking.rollout(asked("a"), ASKED))
    await idle()
    script.done("a1.0")
    await idle()
    assert script.running == ["a0.0", "a2.0", "a1.1"]
    script.done("a1.1", "a0.0", "a2.0", "a0.1", "a2.1")
    assert texts(await rollout) == [["a0.0", "a0.1"], ["a1.0", "a1.1"], ["a2.0", "a2.1"]]
    assert script.examined == [[1], [0, 2]]


async def test_looks_of_one_group_run_beside_first_answers_of_another() -> None:
    """Where rollouts run ahead, a group asks for its first answers in one request: it waits, the engine does not."""
    script = Script(ahead=True)
    rollouts = [asyncio.create_task(script.looking.rollout(asked(name), ASKED)) for name in "ab"]
    await idle()
    script.done("a1.0", "b2.0")
    await idle()
    assert script.running == ["a0.0", "a2.0", "b0.0", "b1.0"] and not script.examined
    script.done("a0.0", "a2.0")
    await idle()
    assert script.running == ["b0.0", "b1.0", "a0.1", "a1.1", "a2.1"] and script.examined == [[0, 1, 2]]
    script.done("a0.1", "a1.1", "a2.1")
    assert texts(await rollouts[0]) == [["a0.0", "a0.1"], ["a1.0", "a1.1"], ["a2.0", "a2.1"]]
    rollouts[1].cancel()
    await asyncio.gather(rollouts[1], return_exceptions=True)
    assert asyncio.all_tasks() == {asyncio.current_task()}, "what was asked for is given up with its group"


@pytest.mark.parametrize("ahead", [False, True])
async def test_an_answer_that_failed_is_not_examined(ahead: bool) -> None:
    script, late = Script(ahead), failure(FailureKind.ENGINE, "late")
    plain = script.sample

    async def failing(prompt: Prompt, index: int, *rest: Any) -> Trajectory:
        one = await plain(prompt, index, *rest)
        return replace(one, failure=late) if index == 1 else one

    script.sample = failing  # type: ignore[method-assign]
    script.done("a0.0", "a1.0", "a2.0", "a0.1", "a2.1")
    done = await script.looking.rollout(asked("a"), ASKED)
    assert texts(done) == [["a0.0", "a0.1"], ["a1.0"], ["a2.0", "a2.1"]] and script.examined == [[0, 2]]
    assert [one.failure for one in done.trajectories] == [None, late, None]


def texts(done: Group) -> list[list[str]]:
    return [[one.text for one in each.turns] for each in done.trajectories]


@pytest.mark.parametrize(("limit", "stored"), [(len(PICTURE), 0), (len(PICTURE) - 1, 3)])
async def test_a_small_picture_travels_in_its_messages(
    limit: int, stored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[bytes] = []
    monkeypatch.setattr(looking, "_BY_VALUE", limit)
    monkeypatch.setattr(looking.ray, "put", lambda data: put.append(data) or "a reference")
    script = Script(ahead=False)
    script.done(*(f"a{index}.{turn}" for index in range(3) for turn in range(2)))
    await script.looking.rollout(asked("a"), ASKED)
    assert put == [PICTURE] * stored
    assert {feed.images[0].ref for feed in script.fed} == {"a reference" if stored else PICTURE}


# ---------------------------------------------------------------- the reward pool


class Queue:
    """Stands for the pool's only worker, as Ray runs it: one call after the other, in the order of arrival."""

    def __init__(self) -> None:
        self.arrived: list[str] = []
        self._next = asyncio.Semaphore(0)
        self._turn = asyncio.Lock()
        self.served: list[str] = []

    def serve(self) -> None:
        self._next.release()

    async def ask(self, wanted: Call[Any, Any], route: Callable[..., Any], limit: Limit) -> Any:
        name = f"{wanted.method} {wanted.arguments[0].prompt.sample.id}"
        self.arrived.append(name)
        async with self._turn:
            await self._next.acquire()
        self.served.append(name)
        if wanted.arguments[0].prompt.sample.id == "late":
            raise Late("no answer")
        return wanted.arguments[0] if wanted.method == "score" else []


async def test_an_examination_overtakes_the_scores_that_wait() -> None:
    placement = PlacementConfig(name="test", device="cpu")
    pool = RewardPool(
        RewardConfig(name="plain", components={"parsed": 1.0}),
        LookConfig(),
        ModelConfig(path="", segmenter=""),
        placement,
        anywhere(placement, "reward", 1),
    )
    worker: Any = Queue()
    pool.actors = worker
    names = ["late", "1", "2", "3", "4"]
    scores = [asyncio.create_task(pool.score(group(trajectory(""), about=asked(name)))) for name in names]
    await idle()
    examination = asyncio.create_task(pool.examine(group(about=asked("5")), STATE))
    for _ in range(6):
        worker.serve()
        await idle()
    await examination
    assert worker.served == ["score late", "score 1", "examine 5", "score 2", "score 3", "score 4"]
    done = await asyncio.gather(*scores)
    assert [one.prompt.sample.id for one in done] == names
    kinds = [one.trajectories[0].failure and one.trajectories[0].failure.kind for one in done]
    assert kinds == [FailureKind.SCORER, None, None, None, None], "one that failed makes way for the next"
