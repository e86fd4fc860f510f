"""Metric catalogue: every metric that a run writes, with its name, its label and the chart it is drawn in.

Names are `group/metric`: W&B makes one section per group. Seconds are wall time in the controller, shares lie in 0..1,
lengths are in tokens. `metrics.jsonl`, W&B, progress, summary and report all read this file.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from perception.types import FailureKind


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart of the report. Charts without a metric that was recorded are left out."""

    title: str
    unit: str
    smooth: bool = False
    """A single noisy series: its running mean is drawn boldly."""
    stacked: bool = False


CHARTS: dict[str, Chart] = {}
"""By title, in the order in which the report shows them."""
LABELS: dict[str, str] = {}
"""Metric -> what it is called in a legend, in the progress line and in the summary."""
DRAWN: dict[str, str] = {}
"""Metric -> title of its chart."""
PROGRESS: dict[str, str] = {}
"""Metric -> how the progress line writes it."""


def _chart(title: str, unit: str = "", smooth: bool = False, stacked: bool = False) -> str:
    CHARTS.setdefault(title, Chart(title, unit, smooth, stacked))
    return title


def _metric(name: str, label: str, chart: str = "", unit: str = "", *, progress: str = "", **look: bool) -> str:
    """`unit` and the chart's `look` (smooth, stacked) stand with the first metric of a chart, or with the chart."""
    LABELS[name] = label
    if chart:
        DRAWN[name] = _chart(chart, unit, **look)
    if progress:
        PROGRESS[name] = progress
    return name


# Reward: over the trajectories of a step that engine and reward worker did not fail
REWARD_MEAN = _metric("reward/mean", "reward", "Reward", "mean per step", smooth=True, progress="reward {:.3f}")
# Perception: mask IoU, where a missed or invented target counts 0
GIOU = _metric("perception/giou", "gIoU", "Training gIoU", "mean IoU", smooth=True, progress="gIoU {:.3f}")
COMPONENTS = _chart("Reward components", "mean raw value")
PARSE_OK = _metric("reward/parse_ok", "answers that parse", progress="parsed {:.1%}")
# Look-to-Confirm (look=relook): over the trajectories of a step
_chart("Re-look rate", "share of answers")
RELOOK_RATE = _metric("look/relook_rate", "looked at again", "Re-look rate", progress="looked again {:.1%}")
RELOOK_CHANGED = _metric("look/changed", "of these, changed", "Re-look rate")  # the kept answer is not the first one
LOOK_PASSES = _metric("look/passes", "passes per trajectory")
# Answers whose confidence lies below the threshold are looked at again
THRESHOLD = _metric("look/threshold", "threshold", "Threshold and confidence", "expected mask IoU")
CONFIDENCE = _metric("look/confidence", "kept answers, mean", "Threshold and confidence")
# Kept answer less the first one, over those looked at again
RELOOK_GAIN = _metric("look/gain", "gain", "Gain of a second look", "mask IoU, mean", smooth=True)
# In ten bins, before this step is learned from
_chart("Calibration error", "|expected − true mask IoU|", smooth=True)
CALIBRATION_ERROR = _metric("look/calibration_error", "error", "Calibration error")
PREFIX_HITS = _metric("look/prefix_hits", "prefix cache hits")  # share of a second pass's prefix that was cached
# Time: seconds of one step by stage, as far as the step waited for it; they add up to the step
SECONDS_GENERATE = _metric("time/generate", "generate", "Time of a step", "seconds", stacked=True)
SECONDS_SCORE = _metric("time/score", "score", "Time of a step")
SECONDS_LEARN = _metric("time/learn", "learn", "Time of a step")
SECONDS_SYNC = _metric("time/sync", "sync", "Time of a step")
SECONDS_CONTROLLER = _metric("time/controller", "controller", "Time of a step")  # the rest
_chart("Throughput", "sampled tokens / s", smooth=True)
TOKENS_PER_S = _metric("throughput/tokens_per_s", "tokens / s", "Throughput", progress="{:,.0f} tok/s")
SECONDS_STEP = _metric("time/step", "step", progress="{:.1f} s/step")
SAMPLES_PER_S = _metric("throughput/samples_per_s", "trajectories / s")
SAM_CACHE_HITS = _metric("throughput/sam_cache_hits", "SAM2 cache hits")  # share of groups
STALENESS = _metric("pipeline/staleness", "oldest", "Staleness of the rollouts", "policy versions behind the learner")
RESAMPLED = _metric("pipeline/resampled", "groups sampled again because they were too old")
LEFT_OUT = _metric("data/left_out", "records left out so far", "Records left out", "records")  # by `on_bad_record`
# Policy update
LOSS = _metric("policy/loss", "loss")
ENTROPY = _metric("policy/entropy", "entropy", "Entropy", "nats per token", smooth=True)
RATIO = _metric("policy/ratio", "ratio", "Importance ratio", "learner / engine")  # mean, before truncation and clipping
IMPORTANCE = _metric("policy/importance", "truncated weight", "Importance ratio")
IMPORTANCE_CAPPED = _metric("policy/importance_capped", "tokens cut at importance_cap")
_chart("Engine against learner", "mean |log-prob difference|")
LOGPROB_MISMATCH = _metric("policy/logprob_mismatch", "mismatch", "Engine against learner")
LOGPROB_MISMATCH_MAX = _metric("policy/logprob_mismatch_max", "largest mismatch")
CLIP_LOW = _metric("policy/clip_low", "below the range", "Clipped tokens", "share")
CLIP_HIGH = _metric("policy/clip_high", "above the range", "Clipped tokens")
KL = _metric("policy/kl", "KL", "KL to the reference", "nats per token")  # the estimate of `algorithm.kl`
GRAD_NORM = _metric("policy/grad_norm", "norm", "Gradient norm", "before clipping", smooth=True)
OPTIMIZER_STEPS = _metric("policy/optimizer_steps", "optimizer steps taken")
SKIPPED = _metric("policy/skipped_steps", "optimizer steps skipped: loss or norm not finite")
POLICY_VERSION = _metric("policy/version", "oldest weights the rollouts were sampled from")
# Responses and rewards
RESPONSE_TOKENS = _metric("response/tokens_mean", "tokens", "Response length", "tokens, mean", smooth=True)
BOXES_ANSWERED = _metric("perception/boxes_answered", "answered", "Boxes", "mean per sample")
BOXES_TRUE = _metric("perception/boxes_true", "true", "Boxes")
REWARD_STD = _metric("reward/std", "reward", "Spread of rewards", "standard deviation", smooth=True)
# Of the sampled groups: they teach nothing
ZERO_VARIANCE = _metric("reward/zero_variance", "share", "Groups with equal rewards", "share", smooth=True)
SAMPLING_ROUNDS = _metric("reward/sampling_rounds", "sampling rounds")  # `algorithm.dynamic=refill`
GROUPS_TRAINED = _metric("reward/groups_trained", "groups the learner got")
FAILURES = _chart("Failed answers", "share")
# Weight sync and learner: one update, all ranks together
SYNC_PAUSE = _metric("time/sync_pause", "engine paused", "Weight sync", "seconds")
SYNC_TRANSFER = _metric("time/sync_transfer", "transfer", "Weight sync")
LEARNER_SAMPLES_PER_S = _metric("learner/samples_per_s", "answers / s", "Learner", "answers / s", smooth=True)
LEARNER_TOKENS_PER_S = _metric("learner/tokens_per_s", "tokens / s")  # without padding, prompts once per group
MFU = _metric("learner/mfu", "MFU", "Learner's model FLOP utilisation", "share", smooth=True)
PEAK_MEMORY = _metric("learner/peak_gib", "peak GiB")  # of the fullest rank: device memory, or resident on the CPU
# Tokens of one row per trajectory / tokens computed
PACKING = _metric("learner/packing", "packing", "Tokens a computed token stands for", "ratio")
ROW_FILL = _metric("learner/row_fill", "not padding", "Tokens a computed token stands for")
COMPILED = _metric("learner/compiled", "graphs compiled so far, rank 0")
FEATURE_HITS = _metric("learner/feature_hits", "frozen vision tower", "Features found", "share of images")
LR = _metric("policy/lr", "lr", "Learning rate")

STAGES = (SECONDS_GENERATE, SECONDS_SCORE, SECONDS_LEARN, SECONDS_SYNC, SECONDS_CONTROLLER)
"""The stages of a step in order; they add up to SECONDS_STEP."""
FAMILIES = COMPONENT_PREFIX, FAILURE_PREFIX = "component/", "failure/"
"""Beginnings of names that end in what a run has."""


def component(name: str) -> str:
    """Mean raw value of one reward component."""
    return COMPONENT_PREFIX + name


def failure(kind: FailureKind) -> str:
    """Share of a step's trajectories that failed in this way."""
    return FAILURE_PREFIX + kind.value


def left_out(reason: str) -> str:
    """Records of the training set that were left out so far for this reason."""
    return f"{LEFT_OUT}_{reason}"


# ---------------------------------------------------------------- held-out evaluation; W&B shows it under `eval/`

GREEDY, SAMPLED, INTERVAL = "greedy", "sampled", "interval"
"""Ways of answering: at temperature 0, and at the rollout temperature; and half the 95 % t-interval of the first, over
the samples, which stands beside the metrics."""
PARSED = "parsed"
SAMPLES = "samples"
LOOK_RATE = "relook_rate"
"""Share of the sampled answers that were looked at again."""
LOOK_GAIN = "look_gain"
"""Mask IoU of what was kept less that of the first pass, over all sampled answers."""
HELD_OUT_LABELS = {
    "mask_iou": "gIoU",
    "s_measure": "S-measure",
    "box_accuracy": "Acc@0.5",
    "box_iou": "box IoU",
    "count_exact": "exact count",
    "count_ratio": "count ratio",
    "detection_f1": "F1 of boxes and labels",
    "perception_r1_ocr": "likeness of texts",
    LOOK_RATE: "looked at again",
    LOOK_GAIN: "mask IoU gained by looking again",
}


class HeldOut(NamedTuple):
    """A held-out metric: its task, what was measured, how it was answered, and on which held-out set."""

    task: str
    measure: str
    """One of the task's metrics, or PARSED, SAMPLES, LOOK_RATE, LOOK_GAIN."""
    way: str = SAMPLED
    held_out: str = ""
    """"" is the set a run is judged by."""

    @property
    def name(self) -> str:
        """As `segment/mask_iou/greedy`, or `segment/mask_iou/greedy@shifted` of a further set."""
        return f"{self.task}/{self.measure}/{self.way}" + (f"@{self.held_out}" if self.held_out else "")

    @property
    def label(self) -> str:
        """As `shifted: gIoU, greedy answers`, without the task."""
        what = HELD_OUT_LABELS.get(self.measure, self.measure)
        which = "" if self.measure in (PARSED, LOOK_RATE, LOOK_GAIN) else f", {self.way} answers"
        return f"{self.held_out}: {what}{which}" if self.held_out else what + which


def read_held_out(names: Iterable[str]) -> list[HeldOut]:
    """The held-out metrics among the names, in their order, without their intervals."""
    split = (name.partition("@") for name in names)
    found = (HeldOut._make((*before.split("/"), held_out)) for before, _, held_out in split if before.count("/") == 2)
    return [one for one in found if one.way != INTERVAL]


def headlines(metrics: Iterable[str]) -> dict[str, HeldOut]:
    """Task -> its first metric, of greedy answers on the first held-out set."""
    found = [one for one in read_held_out(metrics) if one.way == GREEDY and not one.held_out]
    return {one.task: one for one in reversed(found)}


def headline(metrics: Mapping[str, float]) -> float:
    """What a policy is judged by, higher is better: the mean of `headlines`."""
    first = [metrics[one.name] for one in headlines(metrics).values()]
    return sum(first) / len(first) if first else -math.inf
