"""Actors that sleep as long as a simulated stage takes: what `benchmarks.pipeline` puts behind the real pools."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from perception import metric_catalog as catalog
from perception.types import (
    Answer,
    Candidate,
    Group,
    LearnerReport,
    LookState,
    Prompt,
    SamplingSpec,
    Score,
    Trajectory,
    Turn,
    VersionSpan,
)
from perception.weights import EngineInfo

UNIT_S = 0.2
GENERATE, SCORE, LEARN = 3, 1, 2
"""Units that a step's rollouts, scores and optimizer step take."""
PROMPTS = 8
"""Prompts of one step."""
_TOKENS = 32
_LOGPROB = -0.5


class SleepingEngine:
    """Samples the rollouts of one step at a time, all of them at once."""

    def __init__(self, *_: Any) -> None:
        self._version, self._gate = 0, asyncio.Semaphore(PROMPTS)

    async def start(self) -> EngineInfo:
        return EngineInfo(version="none", seconds=0.0)

    async def generate(self, prompt: Prompt, sampling: SamplingSpec) -> Group:
        async with self._gate:
            version = self._version
            await asyncio.sleep(GENERATE * UNIT_S)
        turn = Turn(
            input_ids=prompt.token_ids,
            images=prompt.images,
            token_ids=(5,) * _TOKENS,
            logprobs=(_LOGPROB,) * _TOKENS,
            versions=(VersionSpan(version=version, start=0, end=_TOKENS),),
            text="<think>here</think><answer>[]</answer>",
            finish_reason="stop",
        )
        return Group(
            prompt=prompt, trajectories=tuple(Trajectory(index=index, turns=(turn,)) for index in range(sampling.n))
        )

    async def take_weights(self, version: int) -> None:
        self._version = version

    async def shutdown(self) -> None:
        """Nothing to end."""


class SleepingWorker:
    """Scores one group after the other."""

    def __init__(self, config: Any, *_: Any) -> None:
        self._names, self._rng = (*config.components, *config.ranked), np.random.default_rng(0)

    def start(self) -> float:
        return 0.0

    def score(
        self, group: Group, want_masks: bool = False, held_out: bool = False, look: LookState | None = None
    ) -> Group:
        time.sleep(SCORE * UNIT_S / PROMPTS)
        candidate = Candidate(answer=Answer(objects=()), features=(), confidence=0.5)

        def scored(one: Trajectory) -> Trajectory:
            values = self._rng.random(len(self._names)).tolist()
            return replace(
                one, score=Score(metrics=dict(zip(self._names, values, strict=True)), candidates=(candidate,))
            )

        return replace(group, trajectories=tuple(map(scored, group.trajectories)))


class SleepingRank:
    """Takes one optimizer step at a time."""

    def __init__(self, *_: Any) -> None:
        """Whatever a learner rank is given."""

    def open_store(self) -> tuple[str, int]:
        return "", 0

    def start(self, address: str, port: int) -> float:
        return 0.0

    def logprobs(self, groups: Sequence[Group]) -> list[list[np.ndarray]]:
        """Those of the engine."""
        return [[np.full(one.sampled_tokens, _LOGPROB) for one in group.trajectories] for group in groups]

    def update(self, batches: Sequence[Sequence[Group]]) -> LearnerReport:
        began = time.perf_counter()
        time.sleep(LEARN * UNIT_S)
        return LearnerReport(metrics={catalog.OPTIMIZER_STEPS: 1.0}, seconds=time.perf_counter() - began)

    def save(self, folder: str) -> None:
        """Nothing to save."""
