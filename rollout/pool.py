"""N rollout engines behind one door: routing, weight updates to all, and a bounded number of restarts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from perception.config import PlacementConfig, RolloutConfig
from perception.types import (
    EngineInfo,
    EngineStats,
    Feed,
    Group,
    PolicySpec,
    Prompt,
    SamplingSpec,
    Trajectory,
    Turn,
    UpdateReport,
    WeightBucket,
)
from rollout.engine import EngineDead, RolloutEngine, failed_group, failed_trajectory
from runtime.weights import total

T = TypeVar("T")

MAX_RESTARTS = 3
"""Per engine and run: one that dies more often has a cause that a restart does not cure."""
_SHUTDOWN_TIMEOUT_S = 10.0
_GRACE_S = 10.0
"""An engine that is late itself says with what; so much longer is waited for that."""


class RolloutError(RuntimeError):
    """The engines cannot go on; the message names the engine and what it was doing."""


@dataclass(slots=True)
class _Slot:
    number: int
    options: dict[str, Any]
    actor: Any = None
    in_flight: int = 0
    restarts: int = 0
    revival: asyncio.Task[None] | None = None


class RolloutPool:
    """Lives in one asyncio loop. `await start()` first, `await shutdown()` at the end.

    A restarted engine has the weights on disk, not the current ones. Once a version > 0 was sent, `resync` is awaited
    before it serves again: it must send the current weights through `begin_update`, `stage` and `end_update`.
    """

    def __init__(
        self,
        policy: PolicySpec,
        config: RolloutConfig,
        placement: PlacementConfig,
        *,
        group: PlacementGroup | None = None,
        bundles: Sequence[int] = (),
        resync: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        """`bundles`: for each engine, the index of its bundle in the placement group `group`."""
        self._policy = policy
        self._config = config
        self._placement = placement
        self._resync = resync
        self._resyncing = asyncio.Lock()
        self._version = 0
        self._slots = [_Slot(number, self._options(number, group, bundles)) for number in range(config.engines)]
        self._updating: list[_Slot] = []
        self._staged: list[int | None] = []

    async def start(self) -> list[EngineInfo]:
        """Start all engines at once. Raises RolloutError when one is not ready within `rollout.start_timeout_s`."""
        return list(await asyncio.gather(*(self._launch(slot) for slot in self._slots)))

    async def generate(self, prompt: Prompt, sampling: SamplingSpec) -> Group:
        """Sample a group on the engine with the fewest groups in flight; if that engine dies, on another.

        A group that takes longer than `rollout.request_timeout_s` comes back marked. Raises RolloutError when an engine
        has used up its restarts.
        """
        return await self._ask(
            self._idlest,
            lambda actor: actor.generate.remote(prompt, sampling),
            partial(failed_group, prompt, sampling.n),
        )

    async def sample(
        self, prompt: Prompt, index: int, turns: tuple[Turn, ...], feed: Feed | None, sampling: SamplingSpec
    ) -> Trajectory:
        """One more turn of one sample (see `RolloutEngine.sample`), on the engine whose cache holds the prompt.

        Deaths and timeouts as in `generate`; what comes back marked keeps the turns there were.
        """
        shared = (prompt, index, turns, feed, sampling)
        done = await self._ask(
            partial(self._home, prompt),
            lambda actor: actor.sample.remote(*shared),
            partial(failed_trajectory, prompt, index),
        )
        return done if done.turns else replace(done, turns=turns)

    async def _ask(self, route: Callable[[], _Slot], call: Callable[[Any], Any], failed: Callable[[str], T]) -> T:
        timeout = self._config.request_timeout_s
        while True:
            slot = await self._pick(route)
            actor = slot.actor
            slot.in_flight += 1
            reference = call(actor)
            try:
                return await asyncio.wait_for(reference, timeout)
            except TimeoutError:
                ray.cancel(reference)
                where = f"no answer from rollout engine {slot.number} in {timeout:g} s (rollout.request_timeout_s)"
                return failed(where)
            except (RayActorError, EngineDead) as death:
                if slot.actor is actor and slot.revival is None:
                    slot.revival = asyncio.create_task(self._revive(slot, death))
            finally:
                slot.in_flight -= 1

    def _idlest(self) -> _Slot:
        return min(self._slots, key=lambda slot: (slot.revival is not None, slot.in_flight))

    def _home(self, prompt: Prompt) -> _Slot:
        """The prompt's own engine, unless another one could take it at once while that one has a queue."""
        own, idlest = self._slots[prompt.seed % len(self._slots)], self._idlest()
        queued = own.in_flight - idlest.in_flight >= self._config.max_num_seqs
        return idlest if own.revival is not None or queued else own

    def begin_update(self) -> tuple[str, ...]:
        """The engines that will take the new weights, named so that a restarted one has a new name."""
        self._updating, self._staged = self._running(), []
        return tuple(f"{slot.number}.{slot.restarts}" for slot in self._updating)

    async def stage(self, bucket: WeightBucket) -> None:
        """Give those engines some of the new parameters, to be held while they sample. The bytes are stored once."""
        shared = ray.put(bucket)
        ranks = {slot.number: rank for rank, slot in enumerate(self._updating, start=1)}
        self._staged.append(bucket.checksum)
        await self._all(
            self._updating,
            lambda slot: slot.actor.stage.remote(shared, ranks[slot.number]),
            f"staging weight bucket {len(self._staged)}",
        )

    async def end_update(self, version: int) -> list[UpdateReport]:
        """Pause them, load what is staged, resume; what they sample from here on is stamped `version`.

        Raises RolloutError when the buckets brought checksums and an engine's weights do not add up to them.
        """
        sums = [one for one in self._staged if one is not None]
        reports: list[UpdateReport] = await self._all(
            self._updating, lambda slot: slot.actor.end_update.remote(version, bool(sums)), "taking new weights"
        )
        for slot, report in zip(self._updating, reports, strict=True):
            if sums and report.checksum != total(sums):
                raise RolloutError(
                    f"rollout engine {slot.number} does not hold the learner's weights after the sync of version "
                    f"{version}: its checksum is {report.checksum:016x}, not {total(sums):016x}"
                )
        self._version = version
        return reports

    async def stats(self) -> list[EngineStats]:
        """Of every engine now running, since its last start."""
        return await self._all(self._running(), lambda slot: slot.actor.stats.remote(), "counting")

    @property
    def restarts(self) -> int:
        return sum(slot.restarts for slot in self._slots)

    async def shutdown(self) -> None:
        """End all engines, politely first."""
        for slot in self._slots:
            if slot.revival is not None:
                slot.revival.cancel()
        actors = [slot.actor for slot in self._running()]
        goodbyes = [asyncio.wait_for(actor.shutdown.remote(), _SHUTDOWN_TIMEOUT_S) for actor in actors]
        await asyncio.gather(*goodbyes, return_exceptions=True)
        for actor in actors:
            ray.kill(actor)

    def _options(self, number: int, group: PlacementGroup | None, bundles: Sequence[int]) -> dict[str, Any]:
        options: dict[str, Any] = {"num_cpus": self._placement.engine_cpus, "num_gpus": self._placement.engine_gpus}
        if group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, bundles[number])
        return options

    def _running(self) -> list[_Slot]:
        return [slot for slot in self._slots if slot.actor is not None]

    async def _launch(self, slot: _Slot) -> EngineInfo:
        engine = ray.remote(RolloutEngine).options(**slot.options)
        actor = engine.remote(self._policy, self._config, self._placement.device, self._placement.threads)
        try:
            info = await asyncio.wait_for(actor.start.remote(), self._config.start_timeout_s)
        except TimeoutError as error:
            ray.kill(actor)
            limit = f"{self._config.start_timeout_s:g} s (rollout.start_timeout_s)"
            raise RolloutError(f"rollout engine {slot.number} was not ready within {limit}") from error
        except RayError as error:
            ray.kill(actor)
            raise RolloutError(f"rollout engine {slot.number} did not start: {error}") from error
        slot.actor = actor
        return info

    async def _pick(self, route: Callable[[], _Slot]) -> _Slot:
        for slot in self._slots:
            if slot.revival is not None and slot.revival.done():
                slot.revival.result()
                slot.revival = None
        slot = route()
        if slot.revival is not None:
            await asyncio.shield(slot.revival)
        return slot

    async def _revive(self, slot: _Slot, death: Exception) -> None:
        dead, slot.actor = slot.actor, None
        ray.kill(dead)
        if slot.restarts == MAX_RESTARTS:
            raise RolloutError(f"rollout engine {slot.number} died {MAX_RESTARTS + 1} times; last: {death}") from death
        slot.restarts += 1
        await self._launch(slot)
        if self._version:
            if self._resync is None:
                stale = f"rollout engine {slot.number} was restarted and nothing can send it version {self._version}"
                raise RolloutError(stale)
            async with self._resyncing:
                await self._resync()

    async def _all(self, slots: Iterable[_Slot], call: Callable[[_Slot], Any], doing: str) -> list[Any]:
        return list(await asyncio.gather(*(self._one(slot, call(slot), doing) for slot in slots)))

    async def _one(self, slot: _Slot, reference: Any, doing: str) -> Any:
        limit = self._config.request_timeout_s + _GRACE_S
        try:
            return await asyncio.wait_for(reference, limit)
        except (RayActorError, EngineDead) as error:
            raise RolloutError(f"rollout engine {slot.number} died while {doing}: {error}") from error
        except RayTaskError as error:
            raise RolloutError(f"rollout engine {slot.number}, {doing}: {error.cause}") from error
        except TimeoutError as error:
            late = f"rollout engine {slot.number}: {doing} took more than {limit:g} s (rollout.request_timeout_s)"
            raise RolloutError(late) from error
