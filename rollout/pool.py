"""Rollout engines as one pool: routing of prompts, failures as values, and weight updates to all engines."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial

import ray

from perception.config import PlacementConfig, RolloutConfig
from perception.errors import ActorError
from perception.types import Feed, Group, PolicySpec, Prompt, SamplingSpec, Trajectory, Turn
from perception.weights import EngineInfo, UpdateReport, WeightBucket
from rollout.defaults import by_placement
from rollout.engine import EngineDead, EnginePart, RolloutEngine
from rollout.failures import failed_group, failed_trajectory
from runtime.actors import ActorPool, Call, Late, Limit, Slot, call, idlest
from runtime.placement import Seat
from runtime.weights import total

MAX_RESTARTS = 3
"""Per engine and run: one that dies more often has a cause that a restart does not cure."""
_GRACE_S = 10.0
"""Seconds that the pool waits beyond the engine's own limit, whose error names what the engine was waiting for."""


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
        seats: Sequence[Seat],
        resync: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        """One engine per seat."""
        config = by_placement(config, placement)
        self._config, self._resync, self._resyncing, self._version = config, resync, asyncio.Lock(), 0
        self._limit = Limit(config.request_timeout_s, "rollout.request_timeout_s")
        self._patient = Limit(config.request_timeout_s + _GRACE_S, "rollout.request_timeout_s")
        self.actors: ActorPool[RolloutEngine] = ActorPool(
            "rollout engine",
            RolloutEngine,
            lambda number: (policy, config, placement.device, placement.threads, placement.sleep),
            seats,
            start=Limit(config.start_timeout_s, "rollout.start_timeout_s"),
            restarts=MAX_RESTARTS,
            deaths=(EngineDead,),
            revived=self._give_weights,
        )
        self._asleep: set[EnginePart] = set()
        self._waking = asyncio.Lock()
        self._updating: list[Slot] = []
        self._staged: list[int | None] = []

    async def start(self) -> list[EngineInfo]:
        """Start all engines at once. Raises ActorError when one is not ready within `rollout.start_timeout_s`."""
        return await self.actors.start()

    async def generate(self, prompt: Prompt, sampling: SamplingSpec) -> Group:
        """Sample a group on the engine with the fewest requests in flight; if that engine dies, on another.

        A group that takes longer than `rollout.request_timeout_s` comes back marked. Raises ActorError when an engine
        has used up its restarts.
        """
        await self._wake("weights", "kv_cache")
        try:
            return await self.actors.ask(call(RolloutEngine.generate, prompt, sampling), idlest, self._limit)
        except Late as late:
            return failed_group(prompt, sampling.n, str(late))

    async def sample(
        self, prompt: Prompt, index: int, turns: tuple[Turn, ...], feed: Feed | None, sampling: SamplingSpec
    ) -> Trajectory:
        """One more turn of one sample (see `RolloutEngine.sample`), on the engine whose cache holds the prompt.

        Deaths and timeouts as in `generate`; what comes back marked keeps the turns there were.
        """
        await self._wake("weights", "kv_cache")
        wanted = call(RolloutEngine.sample, prompt, index, turns, feed, sampling)
        try:
            done = await self.actors.ask(wanted, partial(self._home, prompt), self._limit)
        except Late as late:
            done = failed_trajectory(prompt, index, str(late))
        return done if done.turns else replace(done, turns=turns)

    def _home(self, prompt: Prompt, slots: Sequence[Slot]) -> Slot:
        """The prompt's own engine, unless another one could take it at once while that one has a queue."""
        own, other = slots[prompt.seed % len(slots)], idlest(slots)
        queued = own.in_flight - other.in_flight >= self._config.max_num_seqs
        return other if own.revival is not None or queued else own

    def begin_update(self) -> tuple[str, ...]:
        """The workers that will take the new weights, engine by engine, those of a restarted one under new names."""
        self._updating, self._staged = self.actors.running(), []
        workers = range(self._config.tensor_parallel)
        return tuple(f"{slot.number}.{slot.restarts}.{rank}" for slot in self._updating for rank in workers)

    async def stage(self, bucket: WeightBucket) -> None:
        """Give a bucket to the engines of `begin_update`, to hold while they sample. Its bytes are stored once."""
        await self._wake("weights")
        shared = ray.put(bucket)
        self._staged.append(bucket.checksum)
        workers = self._config.tensor_parallel
        calls = [call(RolloutEngine.stage, shared, 1 + workers * number) for number in range(len(self._updating))]
        await self.actors.each(calls, self._patient, self._updating, f"staging weight bucket {len(self._staged)}")

    async def end_update(self, version: int) -> list[UpdateReport]:
        """Pause those engines, load what is staged, resume; what they sample from here on is stamped `version`.

        Raises ActorError when the buckets brought checksums and an engine's weights do not add up to them.
        """
        sums = [one for one in self._staged if one is not None]
        calls = [call(RolloutEngine.end_update, version, bool(sums)) for _ in self._updating]
        reports = await self.actors.each(calls, self._patient, self._updating, "taking new weights")
        for slot, report in zip(self._updating, reports, strict=True):
            if sums and report.checksum != total(sums):
                stale = f"rollout engine {slot.number} does not hold the learner's weights after the sync of version"
                raise ActorError(f"{stale} {version}: its checksum is {report.checksum:016x}, not {total(sums):016x}")
        self._version = version
        await self._wake("kv_cache")
        return reports

    async def shutdown(self) -> None:
        """End all engines, politely first."""
        await self.actors.shutdown(call(RolloutEngine.shutdown))

    async def _give_weights(self, slot: Slot) -> None:
        """The current weights for an engine that was restarted."""
        if not self._version:
            return
        if self._resync is None:
            stale = f"rollout engine {slot.number} was restarted and nothing can send it version {self._version}"
            raise ActorError(stale)
        async with self._resyncing:
            await self._resync()

    async def sleep(self) -> None:
        """Leave the GPUs, once no engine is being restarted. What is asked of the engines next wakes them."""
        await asyncio.gather(*(slot.revival for slot in self.actors.slots if slot.revival is not None))
        if "weights" not in self._asleep:
            await self._all(call(RolloutEngine.sleep), "going to sleep")
            self._asleep = {"weights", "kv_cache"}

    async def _wake(self, *parts: EnginePart) -> None:
        """Bring back those parts that are asleep, for a call that needs them."""
        async with self._waking:
            if back := [part for part in parts if part in self._asleep]:
                await self._all(call(RolloutEngine.wake, back), f"waking up with {' and '.join(back)}")
                self._asleep -= set(back)

    async def _all(self, wanted: Call[RolloutEngine, None], doing: str) -> None:
        await self.actors.each([wanted] * len(self.actors.slots), self._limit, doing=doing)
