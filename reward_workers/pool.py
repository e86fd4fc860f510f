"""Pool of reward workers: an image goes to the worker that has its embedding, and a failure marks its trajectories."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from ray.exceptions import RayTaskError

from perception.config import LookConfig, ModelConfig, PlacementConfig, RewardConfig
from perception.types import Finding, Group, LookState
from reward_workers.worker import RewardWorker, failed_findings, failed_group
from runtime.actors import ActorPool, Call, Late, Limit, Slot, call, idlest
from runtime.placement import Seat

T = TypeVar("T")

MAX_RESTARTS = 2
"""Per worker and run."""
_IMBALANCE = 2
"""An image leaves its own worker when that has so many more groups waiting than the idlest one."""
_SCORES_AT_ONCE = 2
"""Per worker: one that is being scored and the next one. All others wait here, where examinations overtake them: an
answer that is examined holds up its sampling, a score nothing before the end of the step."""


class RewardPool:
    """Lives in one asyncio loop. `await start()` first, `await shutdown()` at the end."""

    def __init__(
        self, config: RewardConfig, look: LookConfig, model: ModelConfig, placement: PlacementConfig, seats: list[Seat]
    ) -> None:
        """One worker per seat."""
        self._limit = Limit(config.timeout_s, "reward.timeout_s")
        self._scoring = asyncio.Semaphore(_SCORES_AT_ONCE * len(seats))
        settings = (config, look, model, placement.device, placement.threads, placement.reward_gpus)
        start = Limit(placement.start_timeout_s, "placement.start_timeout_s")
        self.actors: ActorPool[RewardWorker] = ActorPool(
            "reward worker", RewardWorker, lambda _: settings, seats, start=start, restarts=MAX_RESTARTS
        )

    async def start(self) -> float:
        """Start all workers at once; returns the seconds of the slowest. Raises ActorError when one does not start."""
        return max(await self.actors.start())

    async def score(
        self, group: Group, want_masks: bool = False, held_out: bool = False, look: LookState | None = None
    ) -> Group:
        """Measure a group (see `RewardWorker.score`). One that raises or times out comes back marked as SCORER.

        A group whose worker died is tried again. Raises ActorError when a worker has used up its restarts.
        """
        wanted = call(RewardWorker.score, group, want_masks, held_out, look)
        async with self._scoring:
            return await self._guarded(group, wanted, partial(failed_group, group))

    async def examine(self, group: Group, look: LookState) -> list[Finding]:
        """Findings about a group's answers (see `RewardWorker.examine`); failures as in `score`."""
        wanted = call(RewardWorker.examine, group, look)
        return await self._guarded(group, wanted, partial(failed_findings, group))

    async def shutdown(self) -> None:
        await self.actors.shutdown()

    async def _guarded(self, group: Group, wanted: Call[RewardWorker, T], failed: Callable[[str], T]) -> T:
        try:
            return await self.actors.ask(wanted, partial(_home, group.prompt.images[0].key), self._limit)
        except Late as late:
            return failed(f"{wanted.doing}: {late}")
        except RayTaskError as error:
            return failed(f"{wanted.doing} of '{group.prompt.sample.id}' raised {error.cause!r}")


def _home(key: str, slots: Sequence[Slot]) -> Slot:
    """The worker of the image with this content key, unless another one is clearly less busy."""
    own, other = slots[int(key[:8], 16) % len(slots)], idlest(slots)
    return other if own.in_flight - other.in_flight >= _IMBALANCE else own
