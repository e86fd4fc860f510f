"""A pool of one rollout engine with a tiny policy, and the learner's side of its weight updates without a learner."""

from __future__ import annotations

from perception.config import PlacementConfig, RolloutConfig
from perception.types import PolicySpec
from rollout.pool import RolloutPool
from runtime.placement import anywhere
from tests.hf_reference import Reference

CONFIG = RolloutConfig(max_model_len=1024, kv_cache_mb=64, request_timeout_s=120)
PLACEMENT = PlacementConfig(name="test", device="cpu", threads=1)


class Trainer:
    """Sends the reference model's weights, in buckets. The pool is not started."""

    def __init__(self, policy: PolicySpec) -> None:
        self.reference, self.version = Reference(policy), 0
        seats = anywhere(PLACEMENT, "engine", 1)
        self.pool = RolloutPool(policy, CONFIG, PLACEMENT, seats, self.sync)

    async def sync(self) -> None:
        assert len(self.pool.begin_update()) == 1
        buckets = list(self.reference.buckets())
        assert len(buckets) > 2
        for bucket in buckets:
            await self.pool.stage(bucket)
        (report,) = await self.pool.end_update(self.version)
        assert report.nbytes == sum(bucket.nbytes for bucket in buckets)
        assert report.pause_seconds > 0 and report.transfer_seconds > 0

    async def step(self) -> None:
        self.version += 1
        self.reference.perturb(self.version)
        await self.sync()
