"""What the runs of the ablation come to over the seeds, and how that is shown: Markdown tables and one SVG plot."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import yaml
from scipy import stats

from launch import rundir
from launch.errors import UserError
from launch.report import charts
from perception import names

BASE = "binary"
SHIFTED = "shifted"
LABELS = {"binary": "binary", "look": "+look", "rank": "+rank", "both": "+both", "raw": "raw sum", "relook": "relook"}
SETS = {"in domain": "", "out of domain": SHIFTED}
WAYS = {"sampled": names.GIOU_SAMPLED, "greedy": names.GIOU_GREEDY}
EDGE = 5
"""Steps at either end of a run that its entropy there is the mean of."""
TRAINING: Mapping[str, tuple[str, Callable[[Sequence[float]], float]]] = {
    "reward_std": (names.REWARD_STD, fmean),
    "zero_variance": (names.ZERO_VARIANCE, fmean),
    "entropy_start": (names.ENTROPY, lambda values: fmean(values[:EDGE])),
    "entropy_end": (names.ENTROPY, lambda values: fmean(values[-EDGE:])),
    "response_tokens": (names.RESPONSE_TOKENS, fmean),
    "step_s": (names.SECONDS_STEP, median),
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
    summary = json.loads((run_dir / rundir.SUMMARY).read_text(encoding="utf-8"))
    for name in (metric(way, held_out) for way in WAYS for held_out in SETS):
        if any(summary[when].get(name) is None for when in ("before", "after")):
            raise UserError(f"{run_dir / rundir.SUMMARY} has no {name}: not a run of this ablation; move it away")
    rows, over_steps = rundir.read_lines(run_dir / rundir.METRICS), {}
    for figure, (name, summarise) in TRAINING.items():
        values = [row[name] for row in rows if row.get(name) is not None]
        if not values:
            raise UserError(f"{run_dir / rundir.METRICS} has no {name}: not a run of this ablation; move it away")
        over_steps[figure] = summarise(values)
    config = yaml.safe_load((run_dir / rundir.CONFIG).read_text(encoding="utf-8"))
    return Run(summary["before"], summary["after"], over_steps, config)


def metric(way: str, held_out: str) -> str:
    """As evaluations name it."""
    return "/".join(filter(None, (WAYS[way], SETS[held_out])))


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


def tables(runs: Runs) -> list[str]:
    """Headings, tables and remarks, in order."""
    held_out = [part for way in WAYS for part in (f"## gIoU of {way} answers", _held_out_table(runs, way))]
    return [*held_out, "## Training", _training_table(runs), *_published(runs)]


def _held_out_table(runs: Runs, way: str) -> str:
    rows = []
    for arm in runs:
        changes = [change(runs, arm, metric(way, held_out)) for held_out in SETS]
        cells = [
            (f"{one.before:.3f} -> {one.after:.3f}", one.gain.text(), one.less_binary.text() if one.less_binary else "")
            for one in changes
        ]
        rows.append([LABELS[arm], str(changes[0].gain.n), *(text for three in cells for text in three)])
    columns = [f"{held_out}{column}" for held_out in SETS for column in ("", ": gain", ": less binary")]
    return _table(["arm", "seeds", *columns], rows)


def _training_table(runs: Runs) -> str:
    rows = []
    for arm in runs:
        mean = training(runs, arm)
        cells = [f"{mean['reward_std']:.3f}", f"{mean['zero_variance']:.3f}"]
        cells += [f"{mean['entropy_start']:.3f} -> {mean['entropy_end']:.3f}"]
        rows.append([LABELS[arm], *cells, f"{mean['response_tokens']:.1f}", f"{mean['step_s']:.2f}"])
    entropy = f"entropy, first -> last {EDGE} steps"
    head = ["arm", "std of rewards", "groups without variance", entropy, "tokens per answer", "s per step (median)"]
    return _table(head, rows)


def _published(runs: Runs) -> list[str]:
    """The published ablation, and whether ours has its signs."""
    rows = []
    for arm, claims in CLAIMS.items():
        apart = [ours - base for ours, base in zip(PUBLISHED[arm], PUBLISHED[BASE], strict=True)]
        for held_out, claimed, theirs in zip(SETS, claims, (fmean(apart[:3]), apart[3]), strict=True):
            found = change(runs, arm, metric("sampled", held_out)).less_binary if arm in runs else None
            ours = found.text(100, 1) if found else ""
            rows.append([LABELS[arm], held_out, f"{theirs:+.1f}", SIGNS[claimed], ours, verdict(claimed, found)])
    return [
        "## Beside the published ablation",
        "Dr. Seg, 7B, gIoU in points. No seeds and no intervals were published.",
        _table(["arm", *PUBLISHED_SETS], [[LABELS[arm], *map(str, levels)] for arm, levels in PUBLISHED.items()]),
        "Effects against the binary arm, in points. Theirs: in domain is the mean of the three RefCOCO sets, out of "
        "domain is ReasonSeg val. Ours: sampled answers, paired by seed. *Not resolved*: the interval contains 0. A "
        "claim of no change can be contradicted, never confirmed.",
        _table(["arm", "held-out", "theirs", "claimed", "ours", "does our sign agree?"], rows),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


COLOURS = {"in domain": "#2a6fd0", "out of domain": "#c97b12"}
_BAND = 40
"""Height above the chart, for its title and legend."""
_APART = 0.16
"""In domain and out of it lie so far beside an arm's middle, in arms."""


def plot(runs: Runs) -> str:
    """Gain of every arm as SVG: the mean over seeds with its interval, and a paler dot per seed beside it."""
    found = {held_out: [change(runs, arm, metric("sampled", held_out)) for arm in runs] for held_out in SETS}
    every = [one for changes in found.values() for one in changes]
    shown = [value for one in every for value in (*one.gains.values(), *_ends(one.gain))]
    low, high = min(0.0, *shown), max(0.0, *shown)
    spec = charts.Spec("", "", {"gain": ""}, marks=True)
    axis = charts.chart(spec, [{"step": 0, "gain": low}, {"step": 1, "gain": high}])
    assert axis is not None, "it was given values"
    (_, bottom), (_, top) = axis.series[0].dots
    left, right, foot = charts.LEFT, charts.WIDTH - charts.RIGHT, charts.HEIGHT - charts.BOTTOM + 15

    def x(place: float) -> float:
        return left + (place + 0.5) * (right - left) / len(runs)

    def y(value: float) -> float:
        return bottom + (value - low) / ((high - low) or 1.0) * (top - bottom)

    parts = [f'<path d="M{left} {tick.at:.1f}H{right}" stroke="#e4e3de"/>' for tick in axis.y_ticks]
    parts += [f'<path d="M{left} {y(0.0):.1f}H{right}" stroke="#8d8b84"/>']
    parts += [_text(left - 6, tick.at + 3, tick.label, "end") for tick in axis.y_ticks]
    parts += [_text(x(i), foot, LABELS[arm], "middle") for i, arm in enumerate(runs)]
    for offset, (held_out, changes) in zip((-_APART, _APART), found.items(), strict=True):
        parts += [_mark(x(place + offset), one, y, COLOURS[held_out]) for place, one in enumerate(changes)]
    return _picture(parts)


def _picture(chart: Sequence[str]) -> str:
    """The chart under its title and legend."""
    left, right, width, height = charts.LEFT, charts.WIDTH - charts.RIGHT, charts.WIDTH, charts.HEIGHT + _BAND
    legend = [
        f'<circle cx="{left + 4 + 72 * i}" cy="30" r="3" fill="{colour}"/>' + _text(left + 11 + 72 * i, 33, held_out)
        for i, (held_out, colour) in enumerate(COLOURS.items())
    ]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{2 * width}" '
        f'height="{2 * height}" font-family="system-ui, DejaVu Sans, sans-serif" font-size="9" fill="#3b3b38">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<g font-size="11" font-weight="600">{_text(10, 17, "Gain in held-out gIoU, sampled answers")}</g>',
        *legend,
        _text(right, 33, "bar: 95 % interval; pale: each seed", "end"),
        f'<g transform="translate(0 {_BAND})">',
        *chart,
        "</g>",
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _ends(gain: Interval) -> tuple[float, float]:
    return gain.mean - (gain.half or 0.0), gain.mean + (gain.half or 0.0)


def _mark(x: float, one: Change, y: Callable[[float], float], colour: str) -> str:
    """Dots of the seeds, bar of the interval, dot of the mean."""
    seeds = [f'<circle cx="{x + 6:.1f}" cy="{y(gain):.1f}" r="1.8" opacity="0.5"/>' for gain in one.gains.values()]
    low, high = map(y, _ends(one.gain))
    bar = f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 3:.1f} {low:.1f}h6M{x - 3:.1f} {high:.1f}h6"
    drawn = f'<path d="{bar}" stroke="{colour}" stroke-width="1.3"/>' if one.gain.half is not None else ""
    return f'<g fill="{colour}">{"".join(seeds)}{drawn}<circle cx="{x:.1f}" cy="{y(one.gain.mean):.1f}" r="3"/></g>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
