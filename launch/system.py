"""Everything a run consists of, started together: rollout engines, reward workers, learner, and who sits where."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import ray

from launch import cluster
from launch.data import ImageStore
from launch.prompts import PromptMaker, prompt_seed, read_policy_spec
from learner.pool import LearnerPool
from perception.config import Config
from perception.types import Prompt, Sample, SamplingSpec, ScoredGroup
from reward_workers.pool import RewardPool
from rollout.engine import UpdateReport
from rollout.pool import RolloutPool


class System:
    """The workers of one run. `start` before anything else, `shutdown` at the end whatever happened."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.version = 0
        self.policy = read_policy_spec(config.model)
        self._prompts = PromptMaker(config.model, config.task)
        self._images = ImageStore()
        self._seats = cluster.reserve(config)
        seats, placement = self._seats, config.placement
        # What vLLM computes beside a sequence changes the last bits of its log-probs; alone, it always gets the same.
        rollout = replace(config.rollout, max_num_seqs=1) if config.run.deterministic else config.rollout
        self.engines = RolloutPool(
            self.policy, rollout, placement, group=seats.group, bundles=seats.engines, resync=self.resync
        )
        self.rewards = RewardPool(
            config.reward, config.model, placement, group=seats.group, bundles=seats.reward_workers
        )
        self.learner = LearnerPool(
            self.policy,
            config.learner,
            config.algorithm,
            placement,
            temperature=config.rollout.temperature,
            seed=config.run.seed,
            deterministic=config.run.deterministic,
            group=seats.group,
            bundles=seats.learners,
        )

    async def start(self) -> str:
        """Everything at once; returns a line that says how long each took to be ready."""
        engines, rewards, learner = await asyncio.gather(
            self.engines.start(), self.rewards.start(), self.learner.start()
        )
        slowest = max(engine.seconds for engine in engines)
        return f"ready: vLLM {engines[0].version} {slowest:.0f} s, SAM2 {rewards:.0f} s, learner {learner:.0f} s"

    async def shutdown(self) -> None:
        try:
            await self.engines.shutdown()
            self.rewards.shutdown()
            self.learner.shutdown()
            self._seats.free()
        finally:
            ray.shutdown()

    def prompts(self, samples: Sequence[Sample], step: int) -> list[Prompt]:
        """`step` only seeds the sampling: the same run, step and position draw the same answers."""
        seed = self.config.run.seed
        return [
            self._prompts.prompt(sample, self._images.handle(sample), prompt_seed(seed, step, position))
            for position, sample in enumerate(samples)
        ]

    async def sync_weights(self, version: int) -> list[UpdateReport]:
        """The learner's weights into every engine, bucket by bucket; engines sample from `version` afterwards."""
        self.version = version
        await self.engines.begin_update()
        async for bucket in self.learner.buckets():
            await self.engines.load_bucket(bucket)
        return await self.engines.end_update(version)

    async def resync(self) -> None:
        """The current weights again, for an engine that was restarted."""
        await self.sync_weights(self.version)

    async def answer(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSpec,
        *,
        masks: int = 0,
        metrics: tuple[str, ...] | None = None,
        on_sampled: asyncio.Event | None = None,
    ) -> list[ScoredGroup]:
        """Sample a group per prompt and score it as soon as it is there; the results are in prompt order.

        `metrics` are the components to measure, by default those of the configured reward. The first `masks` groups
        come back with predicted masks, for pictures. `on_sampled` is set once all are sampled.
        """
        waiting = len(prompts)
        gate = asyncio.Semaphore(1 if self.config.run.deterministic else waiting)

        async def one(position: int, prompt: Prompt) -> ScoredGroup:
            nonlocal waiting
            async with gate:
                group = await self.engines.generate(prompt, sampling)
            waiting -= 1
            if not waiting and on_sampled is not None:
                on_sampled.set()
            return await self.rewards.score(group, want_masks=position < masks, names=metrics)

        return list(await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts))))
