"""Guards the supervised actor pool with small real actors: typed calls, named waits, restarts, routing, shutdown."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import ray

from runtime.actors import ActorError, ActorPool, Call, Late, Limit, Slot, call, idlest
from runtime.placement import Seat
from tests.scripted_actor import Spent, Worker

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("shared_ray")]

LONG = Limit(60.0, "patience_s")
SHORT = Limit(0.3, "patience_s")
SEATS = [Seat(0.1, 0.0)] * 2


def make(folder: Path, seats: Sequence[Seat] = SEATS, start: Limit = LONG, **options: Any) -> ActorPool[Worker]:
    return ActorPool("worker", Worker, lambda number: (number, str(folder)), seats, start=start, **options)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ActorPool[Worker]]:
    """Two actors for the tests that end none."""
    made = make(tmp_path_factory.mktemp("notes"))
    assert await made.start() == [10, 11]
    yield made
    await made.shutdown()


def first(slots: Sequence[Slot]) -> Slot:
    return slots[0]


def second(slots: Sequence[Slot]) -> Slot:
    return slots[1]


# ---------------------------------------------------------------- calls


async def test_a_call_goes_there_and_its_result_comes_back(pool: ActorPool[Worker]) -> None:
    assert await pool.ask(call(Worker.add, 1, 2), first, LONG) == (0, 3)
    assert await pool.ask(call(Worker.add, 1), second, LONG) == (1, 6)
    assert await pool.ask(call(Worker.nap, 0.0), second, LONG) == 1  # a coroutine is awaited there
    wanted = call(Worker.die_once, "x")
    assert wanted == Call("die_once", ("x",), {}) and wanted.doing == "die once"


async def test_arguments_of_a_call_go_by_name_too(pool: ActorPool[Worker]) -> None:
    assert await pool.ask(call(Worker.add, 1, other=2), first, LONG) == (0, 3)


async def test_calls_run_side_by_side_and_are_counted(pool: ActorPool[Worker]) -> None:
    naps = [asyncio.create_task(pool.ask(call(Worker.nap, 0.5), idlest, LONG)) for _ in range(6)]
    await asyncio.sleep(0.1)
    assert [slot.in_flight for slot in pool.slots] == [3, 3]  # each to the idlest
    assert sorted(await asyncio.gather(*naps)) == [0, 0, 0, 1, 1, 1]
    assert [slot.in_flight for slot in pool.slots] == [0, 0]


async def test_one_call_for_each_or_for_some(pool: ActorPool[Worker]) -> None:
    calls = [call(Worker.add, number, 0) for number in (7, 8)]
    assert await pool.each(calls, LONG) == [(0, 7), (1, 8)]
    assert await pool.each(calls[:1], LONG, pool.slots[1:]) == [(1, 7)]
    assert pool.running() == pool.slots and pool.restarts == 0


async def test_a_methods_own_error_is_what_it_raised(pool: ActorPool[Worker]) -> None:
    """The actor goes on."""
    with pytest.raises(ValueError, match="the disk is full"):
        await pool.ask(call(Worker.fail, "value"), first, LONG)
    with pytest.raises(ActorError, match=r"^worker 1, fail: ValueError: the disk is full$"):
        await pool.each([call(Worker.fail, "value")], LONG, pool.slots[1:])
    with pytest.raises(ActorError, match=r"^worker 0, saving: ValueError: the disk is full$"):
        await pool.each([call(Worker.fail, "value")], LONG, pool.slots[:1], "saving")
    assert await pool.each([call(Worker.add, 1, 1)] * 2, LONG) == [(0, 2), (1, 2)] and pool.restarts == 0


async def test_a_methods_own_timeout_is_not_taken_for_a_late_answer(pool: ActorPool[Worker]) -> None:
    """As when an image does not come out of the object store."""
    with pytest.raises(TimeoutError, match="the disk is full"):
        await pool.ask(call(Worker.fail, "timeout"), first, LONG)


async def test_a_methods_own_timeout_is_told_as_such_where_all_are_asked(pool: ActorPool[Worker]) -> None:
    with pytest.raises(ActorError, match=r"^worker 0, fail: TimeoutError: the disk is full$") as raised:
        await pool.each([call(Worker.fail, "timeout")], LONG, pool.slots[:1])
    assert not isinstance(raised.value, Late)


# ---------------------------------------------------------------- waits


async def test_every_wait_ends_with_who_what_and_which_setting(pool: ActorPool[Worker]) -> None:
    with pytest.raises(Late, match=r"^no answer from worker 1 in 0\.3 s \(patience_s\)$"):
        await pool.ask(call(Worker.nap, 30.0), second, SHORT)
    with pytest.raises(Late, match=r"^worker 0: nap took more than 0\.3 s \(patience_s\)$"):
        await pool.each([call(Worker.nap, 30.0)], SHORT, pool.slots[:1])
    with pytest.raises(Late, match=r"^worker 0: taking new weights took more than 0\.3 s \(patience_s\)$"):
        await pool.each([call(Worker.nap, 30.0)], SHORT, pool.slots[:1], "taking new weights")
    assert [slot.in_flight for slot in pool.slots] == [0, 0] and pool.restarts == 0
    assert await pool.ask(call(Worker.add, 1, 1), second, LONG) == (1, 2)  # what was late was given up there, too


# ---------------------------------------------------------------- start


async def test_an_actor_that_does_not_start_is_named(tmp_path: Path) -> None:
    broken, slow = make(tmp_path), make(tmp_path, start=SHORT)
    with pytest.raises(ActorError, match=r"^worker [01] did not start: FileNotFoundError: no such weights$"):
        await broken.start(0.0, True)
    with pytest.raises(ActorError, match=r"^worker [01] was not ready within 0\.3 s \(patience_s\)$"):
        await slow.start(30.0)
    await asyncio.gather(broken.shutdown(), slow.shutdown())


# ---------------------------------------------------------------- deaths


async def test_a_dead_actor_is_restarted_and_its_call_done_again(tmp_path: Path) -> None:
    told: list[int] = []

    async def revived(slot: Slot) -> None:
        assert slot.actor is not None
        told.append(slot.number)

    made = make(tmp_path, restarts=2, revived=revived)
    await made.start()
    before = await made.ask(call(Worker.made), first, LONG)
    assert await made.ask(call(Worker.die_once, "a"), first, LONG) == 0
    assert await made.ask(call(Worker.made), first, LONG) > before  # another process
    assert (made.restarts, [slot.restarts for slot in made.slots], told) == (1, [1, 0], [0])
    # calls that die together are one death
    dying = made.ask(call(Worker.die_once, "b"), second, LONG)
    assert await asyncio.gather(dying, *(made.ask(call(Worker.nap, 1.0), second, LONG) for _ in range(4))) == [1] * 5
    assert [slot.restarts for slot in made.slots] == [1, 1] and told == [0, 1]
    await made.shutdown()


async def test_what_a_method_raises_may_be_its_actors_death(tmp_path: Path) -> None:
    made = make(tmp_path, SEATS[:1], restarts=1, deaths=(Spent,))
    await made.start()
    assert await made.ask(call(Worker.give_up, "x"), first, LONG) == 0 and made.restarts == 1
    with pytest.raises(ActorError, match=r"^worker 0 died while give up: Spent: nothing works any more$"):
        await made.each([call(Worker.give_up, "y")], LONG)
    await made.shutdown()


async def test_an_actor_that_keeps_dying_ends_the_run_with_its_name(tmp_path: Path) -> None:
    made = make(tmp_path, SEATS[:1], restarts=1)
    await made.start()
    with pytest.raises(ActorError, match=r"^worker 0 died 2 times; last: "):
        await made.ask(call(Worker.die), first, LONG)
    assert made.restarts == 1
    with pytest.raises(ActorError, match=r"^worker 0 died 2 times"):
        await made.ask(call(Worker.add, 1, 1), first, LONG)  # and so does everything after it
    await made.shutdown()


async def test_a_death_while_all_are_asked_is_named_with_what_was_done(tmp_path: Path) -> None:
    made = make(tmp_path, restarts=3)
    await made.start()
    with pytest.raises(ActorError, match=r"^worker 1 died while die: ActorDiedError: "):
        await made.each([call(Worker.add, 1, 1), call(Worker.die)], LONG)  # type: ignore[list-item]
    await made.shutdown()


async def test_an_actor_that_is_gone_for_good_is_named_where_all_are_asked(tmp_path: Path) -> None:
    """As when an engine has died its last time while new weights are on their way to it."""
    made = make(tmp_path)
    await made.start()
    updating = made.running()
    with pytest.raises(ActorError, match=r"^worker 0 died 1 times"):
        await made.ask(call(Worker.die), first, LONG)
    with pytest.raises(ActorError, match=r"^worker 0 is gone, staging weight bucket 2 was for it$"):
        await made.each([call(Worker.add, 1, 1)] * 2, LONG, updating, "staging weight bucket 2")
    await made.shutdown()


async def test_what_must_be_done_after_a_restart_is_done_before_the_actor_serves(tmp_path: Path) -> None:
    """And where it fails, that is the end: an actor with old weights must not serve."""
    done: list[str] = []

    async def give(slot: Slot) -> None:
        done.append("begun")
        await asyncio.sleep(0.5)
        done.append("given")

    made = make(tmp_path, SEATS[:1], restarts=1, revived=give)
    await made.start()
    waiting = asyncio.create_task(made.ask(call(Worker.die_once, "x"), first, LONG))
    while not done:
        await asyncio.sleep(0.02)
    assert made.slots[0].revival is not None  # its actor is there, and does not serve yet
    assert await made.ask(call(Worker.add, 1, 1), first, LONG) == (0, 2) and done == ["begun", "given"]
    assert await waiting == 0
    await made.shutdown()

    async def cannot(slot: Slot) -> None:
        raise ActorError("nothing can send it version 3")

    made = make(tmp_path, SEATS[:1], restarts=1, revived=cannot)
    await made.start()
    with pytest.raises(ActorError, match="nothing can send it version 3"):
        await made.ask(call(Worker.die_once, "y"), first, LONG)
    await made.shutdown()


async def test_others_serve_while_one_is_restarted(tmp_path: Path) -> None:
    """The idlest slot is none that is being restarted."""
    gate = asyncio.Event()

    async def wait(slot: Slot) -> None:
        await gate.wait()

    made = make(tmp_path, restarts=1, revived=wait)
    await made.start()
    dying = asyncio.create_task(made.ask(call(Worker.die_once, "x"), partial(_own, 0), LONG))
    while made.slots[0].revival is None:
        await asyncio.sleep(0.02)
    assert [await made.ask(call(Worker.add, 1, 1), idlest, LONG) for _ in range(3)] == [(1, 2)] * 3
    assert not dying.done()
    gate.set()
    assert await dying == 0
    await made.shutdown()


def _own(number: int, slots: Sequence[Slot]) -> Slot:
    return slots[number]


# ---------------------------------------------------------------- end


def gone(actor: Any) -> bool:
    try:
        ray.get(actor.made.remote(), timeout=30)
    except ray.exceptions.RayActorError:
        return True
    return False


async def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, "within 30 s"
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("polite", [False, True])
async def test_shutdown_ends_all_politely_where_there_is_a_goodbye(tmp_path: Path, polite: bool) -> None:
    made = make(tmp_path)
    await made.start()
    actors = [slot.actor for slot in made.slots]
    await made.shutdown(call(Worker.farewell) if polite else None)
    for actor in actors:
        await until(partial(gone, actor))
    assert sorted(path.name for path in tmp_path.iterdir()) == (["farewell-0", "farewell-1"] if polite else [])


async def test_shutdown_ends_a_restart_that_is_under_way(tmp_path: Path) -> None:
    async def never(slot: Slot) -> None:
        await asyncio.sleep(3600)

    made = make(tmp_path, SEATS[:1], restarts=1, revived=never)
    await made.start()
    dying = asyncio.create_task(made.ask(call(Worker.die_once, "x"), first, LONG))
    while made.slots[0].revival is None or made.slots[0].actor is None:
        await asyncio.sleep(0.02)
    revival = made.slots[0].revival
    await made.shutdown()
    with pytest.raises(asyncio.CancelledError):
        await dying
    assert revival.cancelled()


async def test_a_pool_that_was_never_started_ends_too(tmp_path: Path) -> None:
    made = make(tmp_path)
    await made.shutdown()
    assert made.running() == []
