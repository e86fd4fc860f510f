"""What one training step is summarised to."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from learner.advantages import Advantages
from perception import metric_catalog as catalog
from perception.calibration import calibration_error
from perception.types import FailureKind, LearnerReport, Score, ScoredGroup, UpdateReport


class StageClock:
    """Wall seconds of a step's stages; what belongs to no stage is the controller's own."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._stages: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._stages[name] += time.perf_counter() - began

    @contextmanager
    def generate_and_score(self) -> Iterator[asyncio.Event]:
        """Scoring overlaps sampling: generation lasts until the yielded event is set, scoring is what comes after."""
        began, sampled = time.perf_counter(), asyncio.Event()
        noted: list[float] = []
        task = asyncio.ensure_future(_note(sampled, noted))
        try:
            yield sampled
        finally:
            task.cancel()
            ended = time.perf_counter()
            generated = noted[0] if noted else ended
            self._stages[catalog.SECONDS_GENERATE] += generated - began
            self._stages[catalog.SECONDS_SCORE] += ended - generated

    def seconds(self) -> dict[str, float]:
        """All stages, the controller's and the whole step so far."""
        step = time.perf_counter() - self._began
        stages = {name: self._stages[name] for name in catalog.STAGES[:-1]}
        return stages | {
            catalog.SECONDS_CONTROLLER: step - sum(stages.values()),
            catalog.SECONDS_STEP: step,
        }


async def _note(event: asyncio.Event, when: list[float]) -> None:
    await event.wait()
    when.append(time.perf_counter())


def step_metrics(
    scored: Sequence[ScoredGroup],
    rewards: Sequence[Sequence[float]],
    advantages: Advantages,
    report: LearnerReport,
    updates: Sequence[UpdateReport],
    clock: StageClock,
) -> dict[str, float]:
    seconds = clock.seconds()
    trajectories = [t for entry in scored for t in entry.group.trajectories]
    tokens = [t.sampled_tokens for t in trajectories]
    return {
        **_rewards(scored, rewards, advantages),
        **_failures(scored),
        **report.metrics,
        **seconds,
        catalog.RESPONSE_TOKENS: float(np.mean(tokens)),
        catalog.SYNC_PAUSE: max(update.pause_seconds for update in updates),
        catalog.SYNC_TRANSFER: max(update.transfer_seconds for update in updates),
        catalog.POLICY_VERSION: float(min(update.version for update in updates) - 1),
        catalog.TOKENS_PER_S: sum(tokens) / seconds[catalog.SECONDS_STEP],
        catalog.SAMPLES_PER_S: len(trajectories) / seconds[catalog.SECONDS_STEP],
        catalog.SAM_CACHE_HITS: float(np.mean([entry.cached for entry in scored])),
    }


def look_metrics(scored: Sequence[ScoredGroup]) -> dict[str, float]:
    """Passes, how often a second look was taken, what it brought and what it cost; 0 gain where there was none."""
    scores = [score for entry in scored for score in entry.scores]
    turns = [turn for entry in scored for one in entry.group.trajectories for turn in one.turns[1:]]
    measured = [score for score in scores if score.candidates]
    again = [score for score in measured if len(score.candidates) > 1]
    gains = [_iou(score, score.kept) - _iou(score, 0) for score in again]
    judged = [one for score in measured for one in score.candidates if one.mask_iou is not None]
    sure = np.array([one.confidence for one in judged])
    return {
        catalog.LOOK_PASSES: float(np.mean([len(score.candidates) for score in measured])),
        catalog.RELOOK_RATE: len(again) / max(1, len(measured)),
        catalog.RELOOK_GAIN: float(np.mean(gains)) if gains else 0.0,
        catalog.RELOOK_CHANGED: float(np.mean([score.kept > 0 for score in again])) if again else 0.0,
        catalog.CONFIDENCE: float(np.mean([score.confidence for score in measured])),
        catalog.CALIBRATION_ERROR: calibration_error(sure, np.array([one.mask_iou for one in judged], np.float64)),
        catalog.PREFIX_HITS: sum(turn.prefix_cached for turn in turns)
        / max(1, sum(turn.prefix_tokens for turn in turns)),
    }


def _iou(score: Score, candidate: int) -> float:
    return score.candidates[candidate].mask_iou or 0.0


def _rewards(
    scored: Sequence[ScoredGroup], rewards: Sequence[Sequence[float]], advantages: Advantages
) -> dict[str, float]:
    scores = [score for entry in scored for score in entry.scores]
    flat = [reward for group in rewards for reward in group]
    kinds = sorted({name for score in scores for name in score.metrics})
    values = {kind: [score.metrics[kind] for score in scores if kind in score.metrics] for kind in kinds}
    metrics = {catalog.component(kind): float(np.mean(values[kind])) for kind in kinds}
    if "mask_iou" in values:
        metrics[catalog.GIOU] = float(np.mean(values["mask_iou"]))
    return metrics | {
        catalog.REWARD_MEAN: float(np.mean(flat)),
        catalog.REWARD_STD: float(np.std(flat)),
        catalog.ZERO_VARIANCE: advantages.zero_variance / len(scored),
        catalog.PARSE_OK: float(np.mean([score.answer.failure is None for score in scores])),
        catalog.BOXES_ANSWERED: float(np.mean([len(score.answer.objects) for score in scores])),
        catalog.BOXES_TRUE: float(np.mean([entry.group.prompt.sample.target.count for entry in scored])),
    }


def _failures(scored: Sequence[ScoredGroup]) -> dict[str, float]:
    """Share of trajectories by kind of failure; the engine's word counts before the scorer's."""
    pairs = [
        (trajectory.failure or score.failure)
        for entry in scored
        for trajectory, score in zip(entry.group.trajectories, entry.scores, strict=True)
    ]
    kinds = Counter(failure.kind for failure in pairs if failure is not None)
    return {catalog.failure(kind): kinds[kind] / len(pairs) for kind in FailureKind}
