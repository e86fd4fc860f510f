"""Guards the pipeline: what is handed out when, how old rollouts may be, what a resumed run hands out again, and that
nothing is left under way. The system is scripted; pipeline, cursor and ledger are real."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from launch.run.cursor import Cursor
from launch.run.looking import Asked
from launch.run.pipeline import Pipeline, Ticket, oldest_version, staleness
from launch.run.prompts import prompt_seed
from perception.config import AlgorithmConfig, PipelineConfig
from perception.types import Group, LookState, Prompt, Sample
from runtime.actors import ActorError
from tests import builders
from tests.builders import changed, group, lost, sample, trajectory, turn

PROMPTS = 4
"""Prompts of one step."""
SAMPLES = [sample(str(i)) for i in range(7)]

Play = Callable[[int, Prompt], Awaitable[Group]]
"""(how many rollouts began before it, prompt) -> its group."""


class Script:
    """Stands for the system: notes what is asked for, and samples each group from the version of its beginning."""

    def __init__(self, staleness: int = 0, play: Play | None = None) -> None:
        plain = builders.config(
            algorithm=AlgorithmConfig(steps=9, prompts_per_step=PROMPTS, group_size=2),
            pipeline=PipelineConfig(max_staleness=staleness),
        )
        self.config = changed(plain, "run", rollouts_kept=2, seed=5)
        self.version = 0
        self.looking: Any = self
        self.asked: list[Prompt] = []
        self.pictured: list[bool] = []
        self.running = 0
        self._play = play

    def look_state(self, explore: bool) -> LookState | None:
        assert explore, "training explores"
        return None

    def prompt(self, asked: Sample, step: int, place: int) -> Prompt:
        return builders.prompt(asked, seed=prompt_seed(self.config.run.seed, step, place))

    async def rollout(self, prompt: Prompt, asked: Asked, want_masks: bool) -> Group:
        assert (asked.sampling.n, asked.held_out, asked.look) == (2, False, None)
        number = len(self.asked)
        self.asked.append(prompt)
        self.pictured.append(want_masks)
        self.running += 1
        try:
            return await self._play(number, prompt) if self._play else sampled(prompt, self.version)
        finally:
            self.running -= 1


def sampled(prompt: Prompt, *versions: int) -> Group:
    """A trajectory per version."""
    return group(*(trajectory(turn("", (1, 2), version=version)) for version in versions), about=prompt)


def pipeline(system: Script, cursor: Cursor | None = None, ledger: deque[Ticket] | None = None) -> Pipeline:
    return Pipeline(system, cursor or Cursor(SAMPLES, 5), deque() if ledger is None else ledger)  # type: ignore[arg-type]


def asked_for(system: Script) -> list[tuple[str, int]]:
    return [(prompt.sample.id, prompt.seed) for prompt in system.asked]


def expected(*tickets: tuple[int, int], start: int = 0) -> list[tuple[str, int]]:
    """Samples in the cursor's order, seeded by step and place."""
    cursor = Cursor(SAMPLES, 5, start)
    return [(cursor.next(1)[0].id, prompt_seed(5, *ticket)) for ticket in tickets]


def step(number: int, places: int = PROMPTS) -> list[tuple[int, int]]:
    return [(number, place) for place in range(places)]


async def idle() -> None:
    """Long enough for everything that can go on to have gone on."""
    for _ in range(20):
        await asyncio.sleep(0)


# ---------------------------------------------------------------- what is handed out when


async def test_without_staleness_nothing_is_handed_out_between_two_takes() -> None:
    system = Script()
    async with pipeline(system) as scored:
        await idle()
        assert not system.asked
        for number in (1, 2, 3):
            taken = await scored.take(PROMPTS, number)
            await idle()  # the learner is busy
            assert len(system.asked) == PROMPTS * number and not scored.ledger
            assert [one.prompt for one in taken] == system.asked[-PROMPTS:]
            system.version = number
    assert asked_for(system) == expected(*step(1), *step(2), *step(3))
    assert system.pictured == [True, True, False, False] * 3 and scored.resampled == 0


@pytest.mark.parametrize("ahead", [1, 2])
async def test_with_staleness_k_the_next_k_steps_are_under_way_and_no_token_is_older(ahead: int) -> None:
    system = Script(ahead)
    async with pipeline(system) as scored:
        for number in range(1, 7):
            taken = await scored.take(PROMPTS, number)
            await idle()
            assert len(system.asked) == PROMPTS * (number + ahead)
            assert len(scored.ledger) == PROMPTS * ahead
            # Rollouts began k takes before: the first k steps are as fresh as can be, all others k versions old.
            assert staleness(taken, system.version) == min(number - 1, ahead) <= ahead
            assert [one.prompt for one in taken] == system.asked[PROMPTS * (number - 1) : PROMPTS * number]
            system.version = number
    # the first take asks for 1 + k steps at once, by tickets of step 1; every further one for one step
    assert asked_for(system) == expected(
        *step(1, PROMPTS * (1 + ahead)), *(ticket for number in range(2, 7) for ticket in step(number))
    )
    assert system.pictured == [True, True, False, False] * (6 + ahead) and scored.resampled == 0


async def test_groups_come_in_prompt_order_whatever_the_order_of_arrival() -> None:
    gates = [asyncio.Event() for _ in range(8)]

    async def play(number: int, prompt: Prompt) -> Group:
        await gates[number].wait()
        return sampled(prompt, 0)

    system = Script(1, play)
    async with pipeline(system) as scored:
        taking = asyncio.create_task(scored.take(PROMPTS, 1))
        for number in (6, 3, 0, 7, 2):
            gates[number].set()
            await idle()
            assert not taking.done()
        gates[1].set()  # the last of the first four; 4 and 5 may still run
        taken = await taking
        assert [one.prompt for one in taken] == system.asked[:PROMPTS]


async def test_a_second_take_of_a_step_goes_on_with_its_places() -> None:
    """As a refill asks: so many more, and what is ahead stays full."""
    system = Script()
    async with pipeline(system) as scored:
        await scored.take(PROMPTS, 1)
        await scored.take(2, 1)
        await scored.take(PROMPTS, 2)
    assert asked_for(system) == expected(*step(1, 6), *step(2))


# ---------------------------------------------------------------- what is too old


async def test_a_group_that_is_too_old_is_sampled_again_and_counted() -> None:
    """One came from an engine that had come back with old weights: half of one trajectory is of version 3."""

    async def play(number: int, prompt: Prompt) -> Group:
        if number == 2:
            return sampled(prompt, 6, 3)
        return sampled(prompt, system.version)

    system = Script(1, play)
    system.version = 5
    async with pipeline(system) as scored:
        taken = await scored.take(PROMPTS, 6)
        assert scored.resampled == 1 and len(system.asked) == 2 * PROMPTS + 1
        again = system.asked[-1]
        assert again == system.asked[2] == taken[2].prompt  # the same sample and seed, in its place
        assert oldest_version(taken[2], 5) == 5 and staleness(taken, 5) == 0


@pytest.mark.parametrize(("age", "again"), [(1, 0), (2, 1)])
async def test_so_many_versions_behind_is_allowed_and_one_more_is_not(age: int, again: int) -> None:
    async def play(number: int, prompt: Prompt) -> Group:
        return sampled(prompt, 9 - age if number == 0 else 9)

    system = Script(1, play)
    system.version = 9
    async with pipeline(system) as scored:
        await scored.take(PROMPTS, 8)
        assert scored.resampled == again


async def test_weights_that_stay_old_end_the_run_by_name() -> None:
    """Sampled three times in all."""

    async def play(number: int, prompt: Prompt) -> Group:
        return sampled(prompt, 0)

    system = Script(0, play)
    system.version = 2
    said = r"sample \d was sampled 3 times from weights more than pipeline\.max_staleness=0 versions behind version 2"
    async with pipeline(system) as scored:
        with pytest.raises(ActorError, match=said):
            await scored.take(1, 3)
        assert len(system.asked) == 3 and scored.resampled == 2


def test_what_took_no_part_has_no_age() -> None:
    about = group(lost(turns=(turn("", (1,), version=1),)), trajectory(turn("", (1,), version=6)), trajectory())
    assert oldest_version(about, 8) == 6 and staleness([about, group(lost())], 8) == 2
    assert oldest_version(group(lost()), 8) == 8 and staleness([], 8) == 0


# ---------------------------------------------------------------- what a resumed run hands out again


@pytest.mark.parametrize("ahead", [0, 1, 2])
async def test_a_resumed_pipeline_hands_out_the_same_samples_and_seeds(ahead: int) -> None:
    """Stopped after three steps and gone on for three: what is taken is what a run that was never stopped takes."""

    async def steps(system: Script, scored: Pipeline, numbers: range) -> list[tuple[str, int]]:
        taken = []
        for number in numbers:
            system.version = number - 1
            taken += await scored.take(PROMPTS, number)
        return [(one.prompt.sample.id, one.prompt.seed) for one in taken]

    whole = Script(ahead)
    async with pipeline(whole) as scored:
        uninterrupted = await steps(whole, scored, range(1, 7))

    cursor, ledger = Cursor(SAMPLES, 5), deque[Ticket]()
    first = Script(ahead)
    async with pipeline(first, cursor, ledger) as scored:
        before = await steps(first, scored, range(1, 4))
    saved = [(ticket.step, ticket.place) for ticket in ledger]  # as a checkpoint keeps it
    position = cursor.position - len(saved)
    assert len(saved) == PROMPTS * ahead

    second = Script(ahead)
    second.version = 3
    resumed = pipeline(second, Cursor(SAMPLES, 5, position), deque(Ticket(*ticket) for ticket in saved))
    async with resumed as scored:
        await idle()
        assert asked_for(second) == expected(*saved, start=position)  # under way before anything is taken
        after = await steps(second, scored, range(4, 7))
    assert before + after == uninterrupted


# ---------------------------------------------------------------- how it ends


def others() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]


async def test_what_a_rollout_raises_surfaces_and_leaves_nothing_behind() -> None:
    async def play(number: int, prompt: Prompt) -> Group:
        if number == 1:
            await idle()
            raise ActorError("rollout engine 0 died 4 times")
        await asyncio.sleep(3600)
        raise AssertionError("nobody waits that long")

    system = Script(1, play)
    with pytest.raises(ActorError, match="rollout engine 0 died 4 times"):
        async with pipeline(system) as scored:
            await scored.take(PROMPTS, 1)
    await idle()
    assert system.running == 0 and others() == set()


async def test_leaving_the_pipeline_ends_what_was_ahead() -> None:
    async def play(number: int, prompt: Prompt) -> Group:
        if number >= PROMPTS:
            await asyncio.sleep(3600)
        return sampled(prompt, 0)

    system = Script(2, play)
    async with pipeline(system) as scored:
        await scored.take(PROMPTS, 1)
        await idle()
        assert system.running == 2 * PROMPTS
    assert system.running == 0 and others() == set()
    assert len(scored.ledger) == 2 * PROMPTS  # which a checkpoint still needs


async def test_a_rollout_that_is_sampled_again_is_ended_too() -> None:
    """One is being sampled again while another one raises."""

    async def play(number: int, prompt: Prompt) -> Group:
        if number == 0:
            return sampled(prompt, 0)  # too old
        if number == 1:
            await idle()
            raise ActorError("reward worker 0 died 3 times")
        if number == PROMPTS:
            await asyncio.sleep(3600)
        return sampled(prompt, 3)

    system = Script(0, play)
    system.version = 3
    with pytest.raises(ActorError, match="died 3 times"):
        async with pipeline(system) as scored:
            await scored.take(PROMPTS, 4)
    await idle()
    assert len(system.asked) == PROMPTS + 1, "the first one was being sampled again"
    assert system.running == 0 and others() == set()


async def test_an_empty_group_of_failures_is_taken_as_it_is() -> None:
    async def play(number: int, prompt: Prompt) -> Group:
        return group(lost(), lost(), about=replace(prompt))

    system = Script(0, play)
    system.version = 7
    async with pipeline(system) as scored:
        taken = await scored.take(PROMPTS, 8)
    assert all(one.excluded for each in taken for one in each.trajectories) and scored.resampled == 0
