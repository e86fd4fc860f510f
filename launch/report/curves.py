"""Which curves a report shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launch.report.charts import Chart, Spec, chart
from launch.summary import held_out_sets
from perception import names

Record = Mapping[str, Any]

_COLOURS = 6
"""Series one chart can tell apart."""
_STAGES = {name: name.partition("/")[2] for name in names.STAGES}


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
        for metric, label in ((names.GIOU_SAMPLED, "sampled"), (names.GIOU_GREEDY, "greedy")):
            series[names.held_out(metric, held_out)] = f"{held_out}, {label}" if held_out else label
    return _spread("Held-out gIoU", "mean IoU", series, marks=True)


def _training(components: Iterable[str], failures: Iterable[str]) -> list[Spec]:
    return [
        Spec("Reward", "mean per step", {names.REWARD_MEAN: "reward"}, smooth=True),
        Spec("Training gIoU", "mean IoU", {names.GIOU: "gIoU"}, smooth=True),
        *_spread("Reward components", "mean raw value", {names.component(name): name for name in components}),
        Spec(
            "Re-look rate",
            "share of answers",
            {names.RELOOK_RATE: "looked at again", names.RELOOK_CHANGED: "of these, changed"},
        ),
        Spec(
            "Threshold and confidence",
            "expected mask IoU",
            {names.THRESHOLD: "threshold", names.CONFIDENCE: "kept answers, mean"},
        ),
        Spec("Gain of a second look", "mask IoU, mean", {names.RELOOK_GAIN: "gain"}, smooth=True),
        Spec("Calibration error", "|expected − true mask IoU|", {names.CALIBRATION_ERROR: "error"}, smooth=True),
        Spec("Time of a step", "seconds", _STAGES, stacked=True),
        Spec("Entropy", "nats per token", {names.ENTROPY: "entropy"}, smooth=True),
        Spec("Importance ratio", "learner / engine", {names.RATIO: "ratio", names.IMPORTANCE: "truncated weight"}),
        Spec("Engine against learner", "mean |log-prob difference|", {names.LOGPROB_MISMATCH: "mismatch"}),
        Spec("Clipped tokens", "share", {names.CLIP_LOW: "below the range", names.CLIP_HIGH: "above the range"}),
        Spec("KL to the reference", "nats per token", {names.KL: "KL"}),
        Spec("Gradient norm", "before clipping", {names.GRAD_NORM: "norm"}, smooth=True),
        Spec("Response length", "tokens, mean", {names.RESPONSE_TOKENS: "tokens"}, smooth=True),
        Spec("Boxes", "mean per sample", {names.BOXES_ANSWERED: "answered", names.BOXES_TRUE: "true"}),
        Spec("Spread of rewards", "standard deviation", {names.REWARD_STD: "reward"}, smooth=True),
        Spec("Groups with equal rewards", "share", {names.ZERO_VARIANCE: "share"}, smooth=True),
        Spec("Failed answers", "share", {names.FAILURE_PREFIX + kind: kind for kind in failures}),
        Spec("Weight sync", "seconds", {names.SYNC_PAUSE: "engine paused", names.SYNC_TRANSFER: "transfer"}),
        Spec("Throughput", "sampled tokens / s", {names.TOKENS_PER_S: "tokens / s"}, smooth=True),
        Spec("Learner", "answers / s", {names.LEARNER_SAMPLES_PER_S: "answers / s"}, smooth=True),
        Spec("Learner's model FLOP utilisation", "share", {names.MFU: "MFU"}, smooth=True),
        Spec("Tokens a computed token stands for", "ratio", {names.PACKING: "packing", names.ROW_FILL: "not padding"}),
        Spec("Features found", "share of images", {names.FEATURE_HITS: "frozen vision tower"}),
        Spec("Learning rate", "", {names.LR: "lr"}),
    ]


def _spread(title: str, unit: str, series: Mapping[str, str], marks: bool = False) -> list[Spec]:
    """As many charts as it takes to tell the series apart."""
    pairs = list(series.items())
    parts = (pairs[i : i + _COLOURS] for i in range(0, len(pairs), _COLOURS))
    return [Spec(title, unit, dict(part), marks=marks) for part in parts]
