"""Rollouts of prompts: sampled by the engines, looked at again where an answer is unsure, scored by reward workers."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import ray

from launch.run.prompts import PromptMaker
from perception.config import Config, RolloutConfig
from perception.images import content_key
from perception.types import Feed, Finding, Group, ImageHandle, LookState, Prompt, SamplingSpec, Span, Trajectory, Turn
from perception.views import picture_size
from reward_workers.pool import RewardPool
from rollout.look import look
from rollout.pool import RolloutPool

_BY_VALUE = 1 << 16
"""Bytes of a picture that travels inside its messages: to put less into the object store costs more than it saves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How prompts are answered and measured."""

    sampling: SamplingSpec
    look: LookState | None = None
    """When to look again; None: one pass."""
    held_out: bool = False
    """Measured by their task's metrics instead of the reward's components."""


def sampled(n: int, config: RolloutConfig) -> SamplingSpec:
    """`n` answers a prompt at the rollout temperature."""
    return SamplingSpec(n=n, temperature=config.temperature, max_new_tokens=config.max_new_tokens)


class Looking:
    """Makes scored groups of prompts: sampling, further looks, scoring."""

    def __init__(self, engines: RolloutPool, rewards: RewardPool, prompts: PromptMaker, config: Config) -> None:
        self._engines, self._rewards, self._prompts, self._config = engines, rewards, prompts, config.look
        self._ahead = config.pipeline.max_staleness > 0
        """Rollouts of further steps fill the engines, so that a group may wait for its first answers and ask for them
        in one request, which costs less; else each is a request of its own, and is looked at again while its siblings
        are still sampled."""
        self._gate = asyncio.Semaphore(1) if config.run.deterministic else nullcontext()
        """Prompts are sampled one at a time, or as many as there are together."""

    async def rollout(self, prompt: Prompt, asked: Asked, want_masks: bool = False) -> Group:
        """The prompt's group, scored. `want_masks`: with predicted masks, for pictures."""
        async with self._gate:
            began = time.monotonic()
            if asked.look is None:
                group = await self._engines.generate(prompt, asked.sampling)
            else:
                group = await self._look(prompt, asked.sampling, asked.look)
            group = replace(group, sampling=Span(began=began, ended=time.monotonic()))
        return await self._rewards.score(group, want_masks, asked.held_out, asked.look)

    async def _look(self, prompt: Prompt, sampling: SamplingSpec, state: LookState) -> Group:
        first = asyncio.ensure_future(self._engines.generate(prompt, sampling)) if self._ahead else None

        async def sample(prompt: Prompt, index: int, turns: tuple[Turn, ...], feed: Feed | None) -> Trajectory:
            if first is not None and feed is None:
                return (await first).trajectories[index]
            return await self._engines.sample(prompt, index, turns, feed, sampling)

        async def examine(group: Group) -> Sequence[Finding]:
            return await self._rewards.examine(group, state)

        return await look(prompt, sampling.n, self._config.max_passes, sample, examine, self._show)

    def _show(self, prompt: Prompt, finding: Finding) -> Feed:
        """The closer view as the policy's next turn."""
        assert finding.view is not None
        size, picture = picture_size(finding.view, self._config.pixels), finding.picture
        ref = ray.put(picture) if len(picture) > _BY_VALUE else picture
        handle = ImageHandle(key=content_key(picture), height=size[0], width=size[1], ref=ref)
        view = self._prompts.view(finding.view, *size)
        return Feed(input_ids=self._prompts.again(prompt.sample.task), images=(handle,), view=view)
