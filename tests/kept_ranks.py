"""Learner ranks in processes that outlive them: to start one takes longer than most of what a test asks of it."""

from __future__ import annotations

from typing import Any

import ray
import torch.distributed as dist

from learner.rank import LearnerRank
from runtime.actors import ActorPool, Slot


class KeptRank(LearnerRank):
    """A rank, and after it another one of the same number among as many, in the same process group."""

    def __init__(self) -> None:
        """Nothing before `renew`."""

    def renew(self, *arguments: Any) -> None:
        LearnerRank.__init__(self, *arguments)

    def _join(self, address: str, port: int) -> None:
        if not dist.is_initialized():
            super()._join(address, port)


class KeptRanks:
    """The processes, made when they are first wanted."""

    def __init__(self) -> None:
        self._actors: dict[tuple[int, int], Any] = {}

    def lend(self, pool: ActorPool[LearnerRank]) -> None:
        """Has a pool that is not started take these processes, and leave them as it ends."""

        def make(slot: Slot) -> None:
            key, options = (slot.number, len(pool.slots)), pool._seats[slot.number].options()
            if key not in self._actors:
                self._actors[key] = ray.remote(KeptRank).options(**options).remote()
            slot.actor = self._actors[key]
            slot.actor.renew.remote(*pool._arguments(slot.number))

        async def leave() -> None:
            """The last call of all has been answered."""

        pool._make, pool.shutdown = make, leave  # type: ignore[method-assign]

    def end(self) -> None:
        while self._actors:
            ray.kill(self._actors.popitem()[1])


KEPT = KeptRanks()
"""For all tests of a process; with its Ray they end."""
