"""Supervised actor pools: engines, reward workers and learner ranks are all started, called and restarted here.

    pool = ActorPool("reward worker", RewardWorker, lambda number: arguments, seats, start=Limit(300, "..."))
    await pool.start()
    group = await pool.ask(call(RewardWorker.score, group), route, Limit(120, "reward.timeout_s"))

Every wait has a limit, and ends with an error that names the actor, what it was doing and the setting of the limit.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from perception.errors import ActorError
from perception.types import Work
from runtime.placement import Seat

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")
_GOODBYE_S = 10.0


class Late(ActorError):
    """No answer within the limit."""


@dataclass(frozen=True, slots=True)
class Limit:
    """The longest wait for something."""

    seconds: float
    setting: str
    """The setting by which a user can change it."""

    def __str__(self) -> str:
        return f"{self.seconds:g} s ({self.setting})"


@dataclass(frozen=True, slots=True)
class Call(Generic[T, R]):
    """A method of T with its arguments; R is what it returns."""

    method: str
    arguments: tuple[Any, ...]
    named: dict[str, Any]

    @property
    def doing(self) -> str:
        return self.method.replace("_", " ")


@overload
def call(  # type: ignore[overload-overlap]  # a coroutine function is also a function
    method: Callable[Concatenate[T, P], Awaitable[R]], *arguments: P.args, **named: P.kwargs
) -> Call[T, R]: ...
@overload
def call(method: Callable[Concatenate[T, P], R], *arguments: P.args, **named: P.kwargs) -> Call[T, R]: ...
def call(method: Callable[..., Any], *arguments: Any, **named: Any) -> Call[Any, Any]:
    """A call that a type checker holds against the method's signature."""
    return Call(method.__name__, arguments, named)


@dataclass(slots=True)
class Slot:
    """One actor's place in its pool; the actor in it changes when it is restarted."""

    number: int
    actor: Any = None
    in_flight: int = 0
    restarts: int = 0
    revival: asyncio.Task[None] | None = None


Route = Callable[[Sequence[Slot]], Slot]
"""Chooses the slot that takes a call."""


def idlest(slots: Sequence[Slot]) -> Slot:
    """The slot with the fewest calls in flight; one that is being restarted comes last."""
    return min(slots, key=lambda slot: (slot.revival is not None, slot.in_flight))


class ActorPool(Generic[T]):
    """N actors of one class, numbered from 0. Lives in one asyncio loop; `start` first, `shutdown` at the end."""

    def __init__(
        self,
        role: str,
        kind: type[T],
        arguments: Callable[[int], tuple[Any, ...]],
        seats: Sequence[Seat],
        *,
        start: Limit,
        restarts: int = 0,
        deaths: tuple[type[Exception], ...] = (),
        revived: Callable[[Slot], Awaitable[object]] | None = None,
    ) -> None:
        """One actor per seat, made with `arguments(number)`; its method `start` is called first.

        restarts: how often each actor may be restarted. deaths: what a method raises when its actor is of no more use.
        revived: awaited after a restart, before the actor serves again.
        """
        self._role, self._kind, self._arguments, self._seats = role, kind, arguments, seats
        self._start_limit, self._restarts, self._revived = start, restarts, revived
        self._deaths: tuple[type[Exception], ...] = (RayActorError, *deaths)
        self.slots = [Slot(number) for number in range(len(seats))]
        self._worked: list[Work] = []
        self._since: dict[tuple[str, str], float] = {}
        self._calls = Counter[tuple[str, str]]()  # in flight, as `_since`: by actor and method

    @property
    def restarts(self) -> int:
        return sum(slot.restarts for slot in self.slots)

    async def start(self, *arguments: Any) -> list[Any]:
        """Start all actors at once; returns what their `start` returned. Raises ActorError for one that does not."""
        self.make()
        return list(await asyncio.gather(*(self._started(slot, *arguments) for slot in self.slots)))

    def make(self) -> None:
        """Make the actors that are not there yet, without calling their `start`."""
        for slot in self.slots:
            if slot.actor is None:
                self._make(slot)

    async def ask(self, wanted: Call[T, R], route: Route, limit: Limit) -> R:
        """Have one actor do it; if that one dies, another.

        Raises Late where nothing came in time, ActorError where an actor has used up its restarts, and what the method
        itself raised.
        """
        while True:
            slot = await self._ready(route)
            actor = slot.actor
            slot.in_flight += 1
            try:
                return await self._answer(slot, wanted, limit, f"no answer from {self._role} {slot.number} in {limit}")
            except self._deaths as death:
                if slot.actor is actor and slot.revival is None:
                    slot.revival = asyncio.create_task(self._revive(slot, death))
            finally:
                slot.in_flight -= 1

    async def each(
        self, calls: Sequence[Call[T, R]], limit: Limit, slots: Sequence[Slot] | None = None, doing: str = ""
    ) -> list[R]:
        """One call per actor, or per slot of `slots`; every failure is an ActorError."""
        pairs = zip(self.slots if slots is None else slots, calls, strict=True)
        return list(await asyncio.gather(*(self._one(slot, wanted, limit, doing) for slot, wanted in pairs)))

    def worked(self) -> list[Work]:
        """What the actors were busy with since this was last asked; overlapping calls of one method are one stretch."""
        now = time.monotonic()
        worked = [*self._worked, *((*key, began, now) for key, began in self._since.items())]
        self._worked, self._since = [], dict.fromkeys(self._since, now)
        return worked

    def running(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.actor is not None]

    async def shutdown(self, goodbye: Call[T, Any] | None = None) -> None:
        """End all actors, politely first where there is a `goodbye`."""
        for slot in self.slots:
            if slot.revival is not None:
                slot.revival.cancel()
        actors = [slot.actor for slot in self.running()]
        if goodbye is not None:
            farewells = [asyncio.wait_for(_sent(actor, goodbye), _GOODBYE_S) for actor in actors]
            await asyncio.gather(*farewells, return_exceptions=True)
        for actor in actors:
            ray.kill(actor)

    def _make(self, slot: Slot) -> None:
        remote = ray.remote(self._kind).options(**self._seats[slot.number].options())
        slot.actor = remote.remote(*self._arguments(slot.number))

    async def _started(self, slot: Slot, *arguments: Any) -> Any:
        who, actor = f"{self._role} {slot.number}", slot.actor
        try:
            late = f"{who} was not ready within {self._start_limit}"
            return await _within(self._start_limit, late, actor.start.remote(*arguments))
        except (Late, RayError) as error:
            ray.kill(actor)
            slot.actor = None
            if isinstance(error, Late):
                raise
            raise ActorError(f"{who} did not start: {_why(error)}") from error

    async def _ready(self, route: Route) -> Slot:
        """The routed slot, once its actor runs. Raises ActorError where an actor could not be restarted."""
        for slot in self.slots:
            if slot.revival is not None and slot.revival.done():
                slot.revival.result()
                slot.revival = None
        slot = route(self.slots)
        if slot.revival is not None:
            await asyncio.shield(slot.revival)
        return slot

    async def _revive(self, slot: Slot, death: Exception) -> None:
        dead, slot.actor = slot.actor, None
        with suppress(RayError):
            ray.kill(dead)
        if slot.restarts == self._restarts:
            times = self._restarts + 1
            raise ActorError(f"{self._role} {slot.number} died {times} times; last: {_why(death)}") from death
        slot.restarts += 1
        self._make(slot)
        await self._started(slot)
        if self._revived is not None:
            await self._revived(slot)

    async def _one(self, slot: Slot, wanted: Call[T, R], limit: Limit, doing: str) -> R:
        where, doing = f"{self._role} {slot.number}", doing or wanted.doing
        if slot.actor is None:
            raise ActorError(f"{where} is gone, {doing} was for it")
        try:
            return await self._answer(slot, wanted, limit, f"{where}: {doing} took more than {limit}")
        except self._deaths as error:
            raise ActorError(f"{where} died while {doing}: {_why(error)}") from error
        except RayTaskError as error:
            raise ActorError(f"{where}, {doing}: {_why(error)}") from error

    async def _answer(self, slot: Slot, wanted: Call[T, R], limit: Limit, late: str) -> R:
        """What the call returns or raises (see `_within`). Until then its actor is busy."""
        key = f"{self._role} {slot.number}", wanted.doing
        self._since.setdefault(key, time.monotonic())
        self._calls[key] += 1
        try:
            return await _within(limit, late, _sent(slot.actor, wanted))
        finally:
            self._calls[key] -= 1
            if not self._calls[key]:
                self._worked.append((*key, self._since.pop(key), time.monotonic()))


def _why(error: Exception) -> str:
    """In one line: what the method raised, or how the actor ended."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0]}" if lines else repr(cause)


def _sent(actor: Any, wanted: Call[Any, R]) -> "ray.ObjectRef[R]":
    """Ray's reference to what the call will return."""
    return getattr(actor, wanted.method).remote(*wanted.arguments, **wanted.named)


async def _within(limit: Limit, late: str, reference: "ray.ObjectRef[R]") -> R:
    """What the call returns or raises; Late(late) after the limit, when the call is given up.

    `asyncio.wait_for` would not do: a TimeoutError that the method itself raised would look like its own.
    """
    answer = asyncio.wrap_future(reference.future())
    try:
        done, _ = await asyncio.wait([answer], timeout=limit.seconds)
    finally:
        answer.cancel()
    if not done:
        ray.cancel(reference)
        raise Late(late)
    return answer.result()
