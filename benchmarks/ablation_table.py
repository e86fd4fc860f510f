"""What the runs of the ablation come to over the seeds, as Markdown tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import jinja2
import yaml
from scipy import stats

from launch.record import run_directory
from perception import metric_catalog as catalog
from perception.errors import UserError
from perception.metric_catalog import GREEDY, SAMPLED, HeldOut

BASE = "binary"
SHIFTED = "shifted"
LABELS = {"binary": "binary", "look": "+look", "rank": "+rank", "both": "+both", "raw": "raw sum", "relook": "relook"}
SETS = {"in domain": "", "out of domain": SHIFTED}
WAYS = (SAMPLED, GREEDY)
EDGE = 5
"""Steps at either end of a run that its entropy there is the mean of."""
TRAINING: Mapping[str, tuple[str, Callable[[Sequence[float]], float]]] = {
    "reward_std": (catalog.REWARD_STD, fmean),
    "zero_variance": (catalog.ZERO_VARIANCE, fmean),
    "entropy_start": (catalog.ENTROPY, lambda values: fmean(values[:EDGE])),
    "entropy_end": (catalog.ENTROPY, lambda values: fmean(values[-EDGE:])),
    "response_tokens": (catalog.RESPONSE_TOKENS, fmean),
    "step_s": (catalog.SECONDS_STEP, median),
}
"""A run's figures over its steps. Seconds: a median, since the first steps warm everything up."""
PUBLISHED_SETS = ("RefCOCO", "RefCOCO+", "RefCOCOg", "ReasonSeg val")
PUBLISHED = {
    "binary": (79.0, 75.3, 72.5, 65.5),
    "look": (79.0, 75.1, 72.1, 66.1),
    "rank": (80.1, 76.6, 73.9, 65.5),
    "both": (80.2, 76.8, 74.2, 67.8),
    "raw": (78.7, 75.0, 71.5, 64.4),
}
"""Dr. Seg's own ablation, gIoU in points. The last set is out of domain, the others are in it."""
CLAIMS = {"rank": (1, 0), "look": (0, 1), "both": (1, 1), "raw": (-1, -1)}
"""What that says of an arm against the binary one, in domain and out of it: up, no change or down."""
SIGNS = {1: "up", 0: "no change", -1: "down"}


@dataclass(frozen=True, slots=True)
class Run:
    before: Mapping[str, float]
    after: Mapping[str, float]
    training: Mapping[str, float]
    config: Mapping[str, Any]


Runs = Mapping[str, Mapping[int, Run]]
"""By arm, then by seed."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over n seeds and half the width of its 95 % t-interval, which one seed leaves open."""

    mean: float
    half: float | None
    n: int

    @property
    def sign(self) -> int:
        """0 where the interval contains 0 or there is none."""
        if self.half is None or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1

    def text(self, scale: float = 1.0, digits: int = 3) -> str:
        spread = "" if self.half is None else f" ± {scale * self.half:.{digits}f}"
        return f"{scale * self.mean:+.{digits}f}{spread}"


@dataclass(frozen=True, slots=True)
class Change:
    """One arm's gIoU on one held-out set."""

    before: float
    after: float
    gains: Mapping[int, float]
    """By seed."""
    gain: Interval
    less_binary: Interval | None
    """How much higher the arm ends than the binary one, paired by seed; None where they share no seed."""


def read(run_dir: Path) -> Run:
    """A finished run. Raises UserError when it lacks a figure the tables need."""
    summary = json.loads((run_dir / run_directory.SUMMARY).read_text(encoding="utf-8"))
    for name in (metric(way, held_out) for way in WAYS for held_out in SETS):
        if any(summary[when].get(name) is None for when in ("before", "after")):
            raise UserError(
                f"{run_dir / run_directory.SUMMARY} has no {name}: not a run of this ablation; move it away"
            )
    rows, over_steps = run_directory.read_lines(run_dir / run_directory.METRICS), {}
    for figure, (name, summarise) in TRAINING.items():
        values = [row[name] for row in rows if row.get(name) is not None]
        if not values:
            raise UserError(
                f"{run_dir / run_directory.METRICS} has no {name}: not a run of this ablation; move it away"
            )
        over_steps[figure] = summarise(values)
    config = yaml.safe_load((run_dir / run_directory.CONFIG).read_text(encoding="utf-8"))
    return Run(summary["before"], summary["after"], over_steps, config)


def metric(way: str, held_out: str, measure: str = "mask_iou") -> str:
    """As evaluations name it; by default the gIoU of the segmentation task."""
    return HeldOut("segment", measure, way, SETS[held_out]).name


def interval(values: Sequence[float]) -> Interval:
    n = len(values)
    half = float(stats.t.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n) if n > 1 else None
    return Interval(fmean(values), half, n)


def change(runs: Runs, arm: str, name: str) -> Change:
    ours, base = runs[arm], {} if arm == BASE else runs.get(BASE, {})
    gains = {seed: run.after[name] - run.before[name] for seed, run in ours.items()}
    apart = [run.after[name] - base[seed].after[name] for seed, run in ours.items() if seed in base]
    return Change(
        before=fmean(run.before[name] for run in ours.values()),
        after=fmean(run.after[name] for run in ours.values()),
        gains=gains,
        gain=interval(list(gains.values())),
        less_binary=interval(apart) if apart else None,
    )


def training(runs: Runs, arm: str) -> dict[str, float]:
    return {figure: fmean(run.training[figure] for run in runs[arm].values()) for figure in TRAINING}


def figures(runs: Runs) -> dict[str, Any]:
    """Every arm's means and intervals, as plain numbers."""
    measured = [metric(way, held_out) for way in WAYS for held_out in SETS]
    return {arm: training(runs, arm) | {name: asdict(change(runs, arm, name)) for name in measured} for arm in runs}


def verdict(claimed: int, found: Interval | None) -> str:
    """Whether our sign is the claimed one. A claimed absence of change can be contradicted, never confirmed."""
    if found is None:
        return "not run"
    if found.sign == 0:
        return "not resolved"
    return "agrees" if found.sign == claimed else "disagrees"


def page(runs: Runs, command: str, overrides: Mapping[str, Sequence[str]]) -> str:
    """Everything as Markdown; `overrides` by arm. Raises UserError where runs differ in more than arm and seed."""
    first, *others = [run for by_seed in runs.values() for run in by_seed.values()]
    for config in (run.config for run in others):
        if any(config[key] != first.config[key] for key in config.keys() - {"reward", "look", "run"}):
            pair = f"{config['run']['name']} and {first.config['run']['name']}"
            raise UserError(f"{pair} differ in more than arm and seed: one table needs all without --table-only")
    return _template().render(
        command=command,
        overrides=overrides,
        seeds=list(dict.fromkeys(seed for by_seed in runs.values() for seed in by_seed)),
        config=first.config,
        samples={
            name: f"{first.after[metric(SAMPLED, held_out, catalog.SAMPLES)]:.0f}" for held_out, name in SETS.items()
        },
        runs=runs,
        labels={arm: LABELS[arm] for arm in runs},
        ways=WAYS,
        sets=SETS,
        change=lambda arm, way, held_out: change(runs, arm, metric(way, held_out)),
        training=partial(training, runs),
        edge=EDGE,
        published_sets=PUBLISHED_SETS,
        published=[(LABELS[arm], levels) for arm, levels in PUBLISHED.items()],
        effects=list(_effects(runs)),
    )


def _effects(runs: Runs) -> Iterator[tuple[str, str, float, str, Interval | None, str]]:
    """Arm, held-out set, the published effect and its sign, ours, and whether the signs agree."""
    for arm, claims in CLAIMS.items():
        apart = [ours - base for ours, base in zip(PUBLISHED[arm], PUBLISHED[BASE], strict=True)]
        for held_out, claimed, theirs in zip(SETS, claims, (fmean(apart[:3]), apart[3]), strict=True):
            found = change(runs, arm, metric(SAMPLED, held_out)).less_binary if arm in runs else None
            yield LABELS[arm], held_out, theirs, SIGNS[claimed], found, verdict(claimed, found)


def _template() -> jinja2.Template:
    text = Path(__file__).with_name("ablation.md.j2").read_text(encoding="utf-8")
    return jinja2.Template(
        text, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
