"""Pipeline: rollouts are produced ahead of the step that learns from them, and taken in prompt order.

    cursor -> sample -> prompt -> sampled (looked at again) -> scored -> [ ahead ] -> take -> rank, combine, advantages
                 |                                                                              |
                 '--- the ledger: handed out, not yet taken --- version <= staleness ---   learner.update -> weight sync

`take(n)` first hands out prompts until `n + max_staleness * prompts_per_step` are under way or ready (fewer where the
run ends before), then waits for the oldest n. That is the backpressure: nothing is handed out between two takes.

    max_staleness = 0   take | sample, score | rank | learn | sync | take ...       the synchronous loop
    max_staleness = k   while step t learns, rollouts of the steps t+1 .. t+k run; weights enter them in flight, and
                        every trajectory carries its version spans

A group is handed out at most k steps before it is taken, so none of its tokens is older than k versions; one that is
all the same (from an engine that came back with old weights) is sampled again.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Self

from launch.run.cursor import Cursor
from launch.run.looking import Asked, sampled
from launch.run.system import System
from perception.errors import ActorError
from perception.types import Group, Sample

_ATTEMPTS = 3
"""Times that a group is sampled before its staleness is an error."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """A prompt handed out: the step that asked for it, and its place among those. Both seed its sampling."""

    step: int
    place: int


@dataclass(slots=True)
class _Ahead:
    ticket: Ticket
    sample: Sample
    want_masks: bool
    group: asyncio.Task[Group]
    """The latest attempt."""


class Pipeline:
    """`async with`: outside it nothing is under way."""

    def __init__(self, system: System, cursor: Cursor, ledger: deque[Ticket]) -> None:
        """`ledger`: handed out and not yet taken, oldest first; it is kept up to date. What a checkpoint left in it is
        handed out again, with the same samples and seeds: `cursor` then stands before them."""
        self._system, self._cursor, self.ledger = system, cursor, ledger
        config = system.config
        self._prompts, self._staleness = config.algorithm.prompts_per_step, config.pipeline.max_staleness
        self._kept, self._every = config.run.rollouts_kept, config.run.rollouts_every
        self._sampling = sampled(config.algorithm.group_size, config.rollout)
        self._ahead: deque[_Ahead] = deque()
        self._step = self._places = 0
        self.resampled = 0
        """Groups sampled again because they were too old."""

    async def __aenter__(self) -> Self:
        for ticket in self.ledger:
            self._start(ticket)
        return self

    async def __aexit__(self, *error: object) -> None:
        tasks = [one.group for one in self._ahead]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def take(self, n: int, step: int) -> list[Group]:
        """The next n groups in prompt order, for training step `step`.

        Raises what a rollout raised, and ActorError where an engine keeps sampling from old weights.
        """
        if step != self._step:
            self._step, self._places = step, 0
        ahead = min(self._staleness, self._system.config.algorithm.steps - step)
        while len(self._ahead) < n + ahead * self._prompts:
            self._hand_out()
        groups = await asyncio.gather(*(self._fresh(one) for one in islice(self._ahead, n)))
        for _ in groups:
            self._ahead.popleft()
            self.ledger.popleft()
        return groups

    def _hand_out(self) -> None:
        ticket = Ticket(self._step, self._places)
        self._places += 1
        self.ledger.append(ticket)
        self._start(ticket)

    def _start(self, ticket: Ticket) -> None:
        (sample,) = self._cursor.next(1)
        ahead, place = divmod(len(self._ahead), self._prompts)
        want_masks = place < self._kept and (self._step + ahead) % self._every == 0
        task = asyncio.create_task(self._rollout(ticket, sample, want_masks))
        self._ahead.append(_Ahead(ticket, sample, want_masks, task))

    async def _rollout(self, ticket: Ticket, sample: Sample, want_masks: bool) -> Group:
        asked = Asked(sampling=self._sampling, look=self._system.look_state(explore=True))
        prompt = self._system.prompt(sample, ticket.step, ticket.place)
        return await self._system.looking.rollout(prompt, asked, want_masks)

    async def _fresh(self, ahead: _Ahead) -> Group:
        attempts = 1
        while staleness([group := await ahead.group], self._system.version) > self._staleness:
            if attempts == _ATTEMPTS:
                raise ActorError(
                    f"sample {ahead.sample.id} was sampled {_ATTEMPTS} times from weights more than "
                    f"pipeline.max_staleness={self._staleness} versions behind version {self._system.version}"
                )
            attempts += 1
            self.resampled += 1
            ahead.group = asyncio.create_task(self._rollout(ahead.ticket, ahead.sample, ahead.want_masks))
        return group


def oldest_version(group: Group, current: int) -> int:
    """Oldest version that any of its tokens was sampled from; `current` where there is none."""
    spans = (span for one in group.trajectories if not one.excluded for turn in one.turns for span in turn.versions)
    return min((span.version for span in spans), default=current)


def staleness(groups: Sequence[Group], current: int) -> int:
    """Versions between `current` and the oldest weights any token of the groups was sampled from."""
    return current - min((oldest_version(group, current) for group in groups), default=current)
