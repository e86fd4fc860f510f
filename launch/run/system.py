"""Everything a run consists of, started together: rollout engines, reward workers, learner, and who sits where."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import ray

from launch.record.look_file import read_look, write_look
from launch.run.data import ImageStore
from launch.run.prompts import PromptMaker, prompt_seed, read_policy_spec
from launch.run.step_metrics import look_metrics
from learner.pool import LearnerPool
from perception import metric_catalog as catalog
from perception.calibration import Calibrator
from perception.config import Config, LookMode
from perception.images import content_key
from perception.types import (
    Feed,
    Finding,
    Group,
    ImageHandle,
    LookState,
    Prompt,
    Sample,
    SamplingSpec,
    ScoredGroup,
    Trajectory,
    Turn,
    UpdateReport,
    View,
)
from reward_workers.pool import RewardPool
from rollout.look import look
from rollout.pool import RolloutPool
from runtime import cluster


class System:
    """The workers of one run. `start` before anything else, `shutdown` at the end whatever happened."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.version = 0
        self._syncing = asyncio.Lock()
        self.look = Calibrator(config.look)
        if (saved := read_look(Path(config.model.path))) is not None:
            self.look.state = saved
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
            config.reward, config.look, config.model, placement, group=seats.group, bundles=seats.reward_workers
        )
        self.learner = LearnerPool(
            self.policy,
            config.learner,
            config.algorithm,
            placement,
            temperature=config.rollout.temperature,
            max_new_tokens=config.rollout.max_new_tokens,
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

    def prompts(self, samples: Sequence[Sample], step: int, mode: LookMode | None = None) -> list[Prompt]:
        """`step` only seeds the sampling: the same run, step and position draw the same answers.

        `mode` decides the prompt's form; by default it is the configured one.
        """
        seed, inline = self.config.run.seed, (mode or self.config.look.mode) == "inline"
        return [
            self._prompts.prompt(sample, self._images.handle(sample), prompt_seed(seed, step, position), inline)
            for position, sample in enumerate(samples)
        ]

    async def sync_weights(self, version: int) -> list[UpdateReport]:
        """The learner's weights into every engine: bucket by bucket while they sample, then all at once in a pause.

        Engines sample from `version` afterwards.
        """
        async with self._syncing:
            self.version = version
            async for bucket in self.learner.buckets(self.engines.begin_update()):
                await self.engines.stage(bucket)
            reports = await self.engines.end_update(version)
            await self.learner.release_buckets()
            return reports

    async def resync(self) -> None:
        """The current weights again, for an engine that was restarted."""
        await self.sync_weights(self.version)

    async def answer(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSpec,
        *,
        mode: LookMode | None = None,
        explore: bool = False,
        masks: int = 0,
        metrics: tuple[str, ...] | None = None,
        on_sampled: asyncio.Event | None = None,
    ) -> list[ScoredGroup]:
        """Sample a group per prompt and score it as soon as it is there; the results are in prompt order.

        `mode` is how to look, by default as configured; `explore` also looks again where that seems not to pay, to
        learn whether it does. `metrics` are the components to measure, by default those of the configured reward. The
        first `masks` groups come back with predicted masks, for pictures. `on_sampled` is set once all are sampled.
        """
        waiting = len(prompts)
        gate = asyncio.Semaphore(1 if self.config.run.deterministic else waiting)
        again = (mode or self.config.look.mode) == "relook"
        state = replace(self.look.state, explore=self.look.state.explore if explore else 0.0)

        async def one(position: int, prompt: Prompt) -> ScoredGroup:
            nonlocal waiting
            async with gate:
                if again:
                    group = await self._look(prompt, sampling, state)
                else:
                    group = await self.engines.generate(prompt, sampling)
            waiting -= 1
            if not waiting and on_sampled is not None:
                on_sampled.set()
            look = state if again else None
            return await self.rewards.score(group, want_masks=position < masks, names=metrics, look=look)

        return list(await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts))))

    async def _look(self, prompt: Prompt, sampling: SamplingSpec, state: LookState) -> Group:
        async def sample(prompt: Prompt, index: int, turns: tuple[Turn, ...], feed: Feed | None) -> Trajectory:
            return await self.engines.sample(prompt, index, turns, feed, sampling)

        async def examine(group: Group) -> Sequence[Finding]:
            return await self.rewards.examine(group, state)

        return await look(prompt, sampling.n, self.config.look.max_passes, sample, examine, self._show)

    def _show(self, prompt: Prompt, finding: Finding) -> Feed:
        """The closer view as the policy's next turn."""
        assert finding.view is not None
        left, top, right, bottom = finding.view
        size = (finding.picture_height, finding.picture_width)
        height, width = self._prompts.answer_frame(*size)
        return Feed(
            input_ids=self._prompts.again(prompt.sample.task),
            images=(
                ImageHandle(
                    key=content_key(finding.picture), height=size[0], width=size[1], ref=ray.put(finding.picture)
                ),
            ),
            view=View(left=left, top=top, right=right, bottom=bottom, height=height, width=width),
        )

    def learn_to_look(self, scored: Sequence[ScoredGroup]) -> dict[str, float]:
        """Ends a step: its looks in figures, measured by what was known before, and then learned from."""
        if self.config.look.mode != "relook":
            return {}
        metrics = look_metrics(scored) | {catalog.THRESHOLD: self.look.state.threshold}
        self.look.learn([score for entry in scored for score in entry.scores])
        return metrics

    async def export(self, folder: Path) -> None:
        """The policy as any released one is, and beside it what it has learned about when to look again."""
        await self.learner.export(str(folder))
        if self.look.fitted:
            write_look(folder, self.look.state)

    @property
    def must_calibrate(self) -> bool:
        """It is to look again and nothing is known yet of when that pays."""
        config = self.config.look
        return config.mode == "relook" and config.trigger != "never" and config.calibration > 0 and not self.look.fitted
