"""Metrics of one training step."""

import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from launch.run.batch import Batch
from launch.run.pipeline import staleness
from launch.run.system import Sync
from perception import metric_catalog as catalog
from perception.calibration import calibration_error
from perception.types import FailureKind, Group, LearnerReport, Score


def step_metrics(step: int, batch: Batch, report: LearnerReport, sync: Sync) -> dict[str, float]:
    """`step` counts from 1; its rollouts are learned by version `step - 1`."""
    trajectories = [one for group in batch.groups for one in group.trajectories]
    tokens = [one.sampled_tokens for one in trajectories]
    seconds = _seconds(batch, report, sync)
    behind = staleness(batch.groups, step - 1)
    metrics = {
        **_rewards(batch.groups),
        **_failures(batch.groups),
        **report.metrics,
        **seconds,
        catalog.RESPONSE_TOKENS: float(np.mean(tokens)),
        catalog.SYNC_PAUSE: sync.pause_seconds,
        catalog.SYNC_TRANSFER: sync.transfer_seconds,
        catalog.POLICY_VERSION: float(step - 1 - behind),
        catalog.STALENESS: float(behind),
        catalog.TOKENS_PER_S: sum(tokens) / seconds[catalog.SECONDS_STEP],
        catalog.SAMPLES_PER_S: len(trajectories) / seconds[catalog.SECONDS_STEP],
        catalog.SAM_CACHE_HITS: float(np.mean([group.cached for group in batch.groups])),
        catalog.SAMPLING_ROUNDS: float(batch.rounds),
        catalog.GROUPS_TRAINED: float(len(batch.teaching)),
    }
    if any(one.kl is not None for one in trajectories):
        penalty = sum(sum(one.kl or 0.0 for one in group.trajectories) for group in batch.groups)
        metrics[catalog.KL] = penalty / max(1, sum(one.sampled_tokens for one in trajectories if one.kl is not None))
    return metrics


def look_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Passes, how often a second look was taken, what it brought and what it cost; 0 gain where there was none."""
    trajectories = [one for group in groups for one in group.trajectories]
    turns = [turn for one in trajectories for turn in one.turns[1:]]
    measured = [one.score for one in trajectories if one.score is not None]
    again = [score for score in measured if len(score.candidates) > 1]
    gains = [_iou(score, score.kept) - _iou(score, 0) for score in again]
    judged = [one for score in measured for one in score.candidates if one.mask_iou is not None]
    sure = np.array([one.confidence for one in judged])
    return {
        catalog.LOOK_PASSES: _mean([len(score.candidates) for score in measured]),
        catalog.RELOOK_RATE: len(again) / max(1, len(measured)),
        catalog.RELOOK_GAIN: float(np.mean(gains)) if gains else 0.0,
        catalog.RELOOK_CHANGED: float(np.mean([score.kept > 0 for score in again])) if again else 0.0,
        catalog.CONFIDENCE: _mean([score.best.confidence for score in measured]),
        catalog.CALIBRATION_ERROR: calibration_error(sure, np.array([one.mask_iou for one in judged], np.float64)),
        catalog.PREFIX_HITS: sum(turn.prefix_cached for turn in turns)
        / max(1, sum(turn.prefix_tokens for turn in turns)),
    }


def _mean(values: Sequence[float]) -> float:
    """NaN, which is recorded as null, where nothing was measured."""
    return float(np.mean(values or [np.nan]))


def _iou(score: Score, candidate: int) -> float:
    return score.candidates[candidate].mask_iou or 0.0


def _seconds(batch: Batch, report: LearnerReport, sync: Sync) -> dict[str, float]:
    """The stages, the controller's own and the whole step so far."""
    step = time.monotonic() - batch.began
    stages = {
        catalog.SECONDS_GENERATE: batch.seconds["generate"],
        catalog.SECONDS_SCORE: batch.seconds["score"],
        catalog.SECONDS_LEARN: batch.seconds["learn"] + report.seconds,
        catalog.SECONDS_SYNC: sync.seconds,
    }
    return stages | {catalog.SECONDS_CONTROLLER: step - sum(stages.values()), catalog.SECONDS_STEP: step}


def _rewards(groups: Sequence[Group]) -> dict[str, float]:
    """Over the trajectories that were measured."""
    scores = [one.score for group in groups for one in group.trajectories if one.score is not None]
    rewards = [one.reward for group in groups for one in group.trajectories if one.reward is not None]
    names = sorted({name for score in scores for name in score.metrics})
    values = {name: float(np.mean([score.metrics[name] for score in scores])) for name in names}
    metrics = {catalog.component(name): value for name, value in values.items()}
    if "mask_iou" in values:
        metrics[catalog.GIOU] = values["mask_iou"]
    return metrics | {
        catalog.REWARD_MEAN: _mean(rewards),
        catalog.REWARD_STD: float(np.std(rewards or [np.nan])),
        catalog.ZERO_VARIANCE: float(np.mean([not group.teaches for group in groups])),
        catalog.PARSE_OK: _mean([score.best.answer.failure is None for score in scores]),
        catalog.BOXES_ANSWERED: _mean([len(score.best.answer.objects) for score in scores]),
        catalog.BOXES_TRUE: float(np.mean([group.prompt.sample.target.count for group in groups])),
    }


def _failures(groups: Sequence[Group]) -> dict[str, float]:
    """Share of trajectories by kind of failure."""
    failures = [one.failure for group in groups for one in group.trajectories]
    kinds = Counter(failure.kind for failure in failures if failure is not None)
    return {catalog.failure(kind): kinds[kind] / len(failures) for kind in FailureKind}
