"""N reward workers behind one door: images stay where their embedding is, and a failure becomes a marked score."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from perception.config import LookConfig, ModelConfig, PlacementConfig, RewardConfig
from perception.types import Finding, Group, LookState, ScoredGroup
from reward_workers.worker import RewardWorker, failed_findings, failed_group

T = TypeVar("T")

MAX_RESTARTS = 2
"""Per worker and run."""
_IMBALANCE = 2
"""An image leaves its own worker when that has so many more groups waiting than the idlest one."""


class RewardError(RuntimeError):
    """The reward workers cannot go on; the message names the worker and why."""


@dataclass(slots=True)
class _Slot:
    number: int
    options: dict[str, Any]
    actor: Any = None
    in_flight: int = 0
    restarts: int = 0


class RewardPool:
    """Lives in one asyncio loop. `await start()` first, `shutdown()` at the end."""

    def __init__(
        self,
        config: RewardConfig,
        look: LookConfig,
        model: ModelConfig,
        placement: PlacementConfig,
        *,
        group: PlacementGroup | None = None,
        bundles: Sequence[int] = (),
    ) -> None:
        """`bundles`: for each worker, the index of its bundle in the placement group `group`."""
        self._config, self._look, self._model, self._placement = config, look, model, placement
        self._slots = [_Slot(number, self._options(number, group, bundles)) for number in range(config.workers)]
        self._restarting = asyncio.Lock()

    async def start(self) -> float:
        """Start all workers at once; returns the seconds of the slowest. Raises RewardError when one does not start."""
        return max(await asyncio.gather(*(self._launch(slot) for slot in self._slots)))

    async def score(
        self,
        group: Group,
        want_masks: bool = False,
        names: tuple[str, ...] | None = None,
        look: LookState | None = None,
    ) -> ScoredGroup:
        """Measure a group (see `RewardWorker.score`). One that raises or times out comes back marked as SCORER.

        A group whose worker died is tried again. Raises RewardError when a worker has used up its restarts.
        """
        return await self._guarded(group, "score", partial(failed_group, group), want_masks, names, look)

    async def examine(self, group: Group, look: LookState) -> list[Finding]:
        """Say how far a group's answers can be believed (see `RewardWorker.examine`); failures as in `score`."""
        return await self._guarded(group, "examine", partial(failed_findings, group), look)

    async def stats(self) -> Mapping[str, float]:
        """Sums over all workers of `RewardWorker.stats`."""
        calls = (asyncio.wait_for(slot.actor.stats.remote(), self._config.timeout_s) for slot in self._slots)
        every = await asyncio.gather(*calls)
        return {name: sum(one[name] for one in every) for name in every[0]}

    @property
    def restarts(self) -> int:
        return sum(slot.restarts for slot in self._slots)

    def shutdown(self) -> None:
        for slot in self._slots:
            if slot.actor is not None:
                ray.kill(slot.actor)

    async def _guarded(self, group: Group, method: str, failed: Callable[[str], T], *arguments: Any) -> T:
        try:
            return await self._call(group.prompt.images[0].key, method, group, *arguments)
        except TimeoutError:
            return failed(f"{method}: no answer within {self._config.timeout_s:g} s (reward.timeout_s)")
        except RayTaskError as error:
            return failed(f"{method} of '{group.prompt.sample.id}' raised {error.cause!r}")

    async def _call(self, key: str, method: str, *arguments: Any) -> Any:
        while True:
            slot = self._route(key)
            actor = slot.actor
            slot.in_flight += 1
            reference = getattr(actor, method).remote(*arguments)
            try:
                return await asyncio.wait_for(reference, self._config.timeout_s)
            except TimeoutError:
                ray.cancel(reference)
                raise
            except RayActorError as death:
                await self._restart(slot, actor, death)
            finally:
                slot.in_flight -= 1

    def _route(self, key: str) -> _Slot:
        """The image's own worker, unless another one is clearly less busy."""
        own = self._slots[int(key[:8], 16) % len(self._slots)]
        idlest = min(self._slots, key=lambda slot: slot.in_flight)
        return idlest if own.in_flight - idlest.in_flight >= _IMBALANCE else own

    def _options(self, number: int, group: PlacementGroup | None, bundles: Sequence[int]) -> dict[str, Any]:
        options: dict[str, Any] = {"num_cpus": self._placement.reward_cpus, "num_gpus": self._placement.reward_gpus}
        if group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, bundles[number])
        return options

    async def _launch(self, slot: _Slot) -> float:
        worker = ray.remote(RewardWorker).options(**slot.options)
        placement = self._placement
        actor = worker.remote(self._config, self._look, self._model, placement.device, placement.threads)
        try:
            seconds = await asyncio.wait_for(actor.start.remote(), self._placement.start_timeout_s)
        except TimeoutError as error:
            ray.kill(actor)
            limit = f"{self._placement.start_timeout_s:g} s (placement.start_timeout_s)"
            raise RewardError(f"reward worker {slot.number} was not ready within {limit}") from error
        except RayError as error:
            ray.kill(actor)
            raise RewardError(f"reward worker {slot.number} did not start: {error}") from error
        slot.actor = actor
        return seconds

    async def _restart(self, slot: _Slot, dead: Any, death: Exception) -> None:
        async with self._restarting:
            if slot.actor is not dead:
                return  # another call was here first
            if slot.restarts == MAX_RESTARTS:
                times = MAX_RESTARTS + 1
                raise RewardError(f"reward worker {slot.number} died {times} times; last: {death}") from death
            slot.restarts += 1
            await self._launch(slot)
