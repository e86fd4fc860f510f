"""Which curves a report shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launch.record.summary import held_out_sets
from launch.report.charts import Chart, Spec, chart
from perception import metric_catalog as catalog

Record = Mapping[str, Any]

_COLOURS = 6
"""Series one chart can tell apart."""
_STAGES = {name: name.partition("/")[2] for name in catalog.STAGES}


def curves(
    metrics: Sequence[Record], evaluations: Sequence[Record], components: Iterable[str], failures: Iterable[str]
) -> list[Chart]:
    """The charts of what was recorded. `components` of the reward; `failures`: the kinds that occurred."""
    drawn = [
        *(chart(spec, evaluations) for spec in _held_out(evaluations)),
        *(chart(spec, metrics) for spec in _training(components, failures)),
    ]
    return [one for one in drawn if one is not None]


def _held_out(evaluations: Sequence[Record]) -> list[Spec]:
    series = {}
    for held_out in held_out_sets({name: None for record in evaluations for name in record}):
        for metric, label in ((catalog.GIOU_SAMPLED, "sampled"), (catalog.GIOU_GREEDY, "greedy")):
            series[catalog.held_out(metric, held_out)] = f"{held_out}, {label}" if held_out else label
    return _spread("Held-out gIoU", "mean IoU", series, marks=True)


def _training(components: Iterable[str], failures: Iterable[str]) -> list[Spec]:
    return [
        Spec("Reward", "mean per step", {catalog.REWARD_MEAN: "reward"}, smooth=True),
        Spec("Training gIoU", "mean IoU", {catalog.GIOU: "gIoU"}, smooth=True),
        *_spread("Reward components", "mean raw value", {catalog.component(name): name for name in components}),
        Spec(
            "Re-look rate",
            "share of answers",
            {catalog.RELOOK_RATE: "looked at again", catalog.RELOOK_CHANGED: "of these, changed"},
        ),
        Spec(
            "Threshold and confidence",
            "expected mask IoU",
            {catalog.THRESHOLD: "threshold", catalog.CONFIDENCE: "kept answers, mean"},
        ),
        Spec("Gain of a second look", "mask IoU, mean", {catalog.RELOOK_GAIN: "gain"}, smooth=True),
        Spec("Calibration error", "|expected − true mask IoU|", {catalog.CALIBRATION_ERROR: "error"}, smooth=True),
        Spec("Time of a step", "seconds", _STAGES, stacked=True),
        Spec("Entropy", "nats per token", {catalog.ENTROPY: "entropy"}, smooth=True),
        Spec(
            "Importance ratio",
            "learner / engine",
            {catalog.RATIO: "ratio", catalog.IMPORTANCE: "truncated weight"},
        ),
        Spec("Engine against learner", "mean |log-prob difference|", {catalog.LOGPROB_MISMATCH: "mismatch"}),
        Spec(
            "Clipped tokens",
            "share",
            {catalog.CLIP_LOW: "below the range", catalog.CLIP_HIGH: "above the range"},
        ),
        Spec("KL to the reference", "nats per token", {catalog.KL: "KL"}),
        Spec("Gradient norm", "before clipping", {catalog.GRAD_NORM: "norm"}, smooth=True),
        Spec("Response length", "tokens, mean", {catalog.RESPONSE_TOKENS: "tokens"}, smooth=True),
        Spec("Boxes", "mean per sample", {catalog.BOXES_ANSWERED: "answered", catalog.BOXES_TRUE: "true"}),
        Spec("Spread of rewards", "standard deviation", {catalog.REWARD_STD: "reward"}, smooth=True),
        Spec("Groups with equal rewards", "share", {catalog.ZERO_VARIANCE: "share"}, smooth=True),
        Spec("Failed answers", "share", {catalog.FAILURE_PREFIX + kind: kind for kind in failures}),
        Spec(
            "Weight sync",
            "seconds",
            {catalog.SYNC_PAUSE: "engine paused", catalog.SYNC_TRANSFER: "transfer"},
        ),
        Spec("Throughput", "sampled tokens / s", {catalog.TOKENS_PER_S: "tokens / s"}, smooth=True),
        Spec("Learner", "answers / s", {catalog.LEARNER_SAMPLES_PER_S: "answers / s"}, smooth=True),
        Spec("Learner's model FLOP utilisation", "share", {catalog.MFU: "MFU"}, smooth=True),
        Spec(
            "Tokens a computed token stands for",
            "ratio",
            {catalog.PACKING: "packing", catalog.ROW_FILL: "not padding"},
        ),
        Spec("Features found", "share of images", {catalog.FEATURE_HITS: "frozen vision tower"}),
        Spec("Learning rate", "", {catalog.LR: "lr"}),
    ]


def _spread(title: str, unit: str, series: Mapping[str, str], marks: bool = False) -> list[Spec]:
    """As many charts as it takes to tell the series apart."""
    pairs = list(series.items())
    parts = (pairs[i : i + _COLOURS] for i in range(0, len(pairs), _COLOURS))
    return [Spec(title, unit, dict(part), marks=marks) for part in parts]
