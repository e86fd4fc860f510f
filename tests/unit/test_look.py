"""The Look-to-Confirm loop with a scripted policy and reward pool: who is asked again, and that nobody waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from perception.types import FailureKind, Feed, Finding, Group, Prompt, Trajectory, Turn
from rollout.look import look
from tests import builders
from tests.builders import failure, prompt, sample, trajectory

SEEN = Finding(confidence=0.9)
AGAIN = Finding(confidence=0.1, view=(10, 20, 60, 70), picture=b"png")
PROMPT = prompt(sample(height=100, width=100))


def turn(text: str, feed: Feed | None) -> Turn:
    return builders.turn(text, (1,), view=feed.view if feed else None)


def show(prompt: Prompt, finding: Finding) -> Feed:
    assert finding.view is not None
    return Feed(input_ids=(7,), images=(), view=builders.view(*finding.view))


async def sampled(prompt: Prompt, index: int, turns: tuple[Turn, ...], feed: Feed | None) -> Trajectory:
    return trajectory(*turns, turn(f"{index}.{len(turns)}", feed), index=index)


def run(judge: Callable[[Trajectory], Finding], n: int = 4, passes: int = 2) -> Group:
    async def examine(group: Group) -> list[Finding]:
        return [judge(trajectory) for trajectory in group.trajectories]

    return asyncio.run(look(PROMPT, n, passes, sampled, examine, show))


def test_only_the_unsure_are_asked_again() -> None:
    group = run(lambda t: AGAIN if t.index % 2 else SEEN)
    assert [[t.text for t in one.turns] for one in group.trajectories] == [
        ["0.0"],
        ["1.0", "1.1"],
        ["2.0"],
        ["3.0", "3.1"],
    ]
    assert [one.index for one in group.trajectories] == [0, 1, 2, 3]
    view = group.trajectories[1].turns[1].view
    assert view is not None and (view.left, view.top, view.right, view.bottom) == (10, 20, 60, 70)
    assert group.trajectories[1].turns[0].view is None


@pytest.mark.parametrize("passes", [2, 3, 5])
def test_the_number_of_passes_is_bounded(passes: int) -> None:
    group = run(lambda t: AGAIN, n=2, passes=passes)
    assert {len(t.turns) for t in group.trajectories} == {passes}


def test_what_failed_is_not_looked_at_again() -> None:
    truncated = failure(FailureKind.TRUNCATED)

    async def cut(prompt: Prompt, index: int, turns: tuple[Turn, ...], feed: Feed | None) -> Trajectory:
        return trajectory(turn("x", None), index=index, failure=truncated)

    async def examine(group: Group) -> list[Finding]:
        raise AssertionError("asked about a failure")

    (only,) = asyncio.run(look(PROMPT, 1, 2, cut, examine, show)).trajectories
    assert len(only.turns) == 1 and only.failure == truncated


def test_an_examination_that_fails_marks_its_trajectories() -> None:
    late = failure(FailureKind.SCORER, "late")
    group = run(lambda t: Finding(confidence=0.0, failure=late) if t.index == 1 else AGAIN, n=3)
    assert [t.failure for t in group.trajectories] == [None, late, None]
    assert [len(t.turns) for t in group.trajectories] == [2, 1, 2]


def test_no_sample_waits_for_anothers_first_pass() -> None:
    """Sample 0's first pass ends only after sample 1 has had its second."""
    done: list[str] = []

    async def play() -> Group:
        second = asyncio.Event()

        async def slow(prompt: Prompt, index: int, turns: tuple[Turn, ...], feed: Feed | None) -> Trajectory:
            if index == 0 and not turns:
                await asyncio.wait_for(second.wait(), 5)
            one = await sampled(prompt, index, turns, feed)
            done.append(one.text)
            if index == 1 and turns:
                second.set()
            return one

        async def examine(group: Group) -> list[Finding]:
            return [AGAIN for _ in group.trajectories]

        return await look(PROMPT, 2, 2, slow, examine, show)

    asyncio.run(play())
    assert done == ["1.0", "1.1", "0.0", "0.1"]


def test_answers_that_arrive_during_an_examination_go_together() -> None:
    calls: list[list[int]] = []

    async def play() -> Group:
        async def examine(group: Group) -> list[Finding]:
            calls.append([t.index for t in group.trajectories])
            await asyncio.sleep(0.05)
            return [SEEN for _ in group.trajectories]

        async def staggered(prompt: Prompt, index: int, turns: tuple[Turn, ...], feed: Feed | None) -> Trajectory:
            await asyncio.sleep(0.01 * index)
            return await sampled(prompt, index, turns, feed)

        return await look(PROMPT, 5, 2, staggered, examine, show)

    asyncio.run(play())
    assert sorted(i for call in calls for i in call) == [0, 1, 2, 3, 4]
    assert calls[0] == [0] and len(calls) <= 3


def test_a_reward_pool_that_cannot_go_on_ends_the_group_at_once() -> None:
    async def examine(group: Group) -> list[Finding]:
        raise RuntimeError("reward worker 0 died 3 times")

    with pytest.raises(RuntimeError, match="died 3 times"):
        asyncio.run(look(PROMPT, 3, 2, sampled, examine, show))
