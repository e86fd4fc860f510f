"""Comparison of runs as one page: what was set, the headline metrics with their intervals, curves over one another.

The runs are a sweep's combinations (`sweep.json` says which), or any others: then by the settings in which they differ.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from launch.record import run_directory
from launch.record.summary import half_interval
from launch.report import charts
from launch.report.charts import chart
from launch.report.curves import Record, spread
from launch.report.page import render
from launch.run.command_line import leaves
from perception import metric_catalog as catalog
from perception.files import write_text

SEED = "run.seed"
COMPARED = (catalog.REWARD_MEAN, catalog.GIOU, catalog.ENTROPY, catalog.RESPONSE_TOKENS, catalog.GRAD_NORM)
"""Training metrics whose curves are drawn."""


@dataclass(slots=True)
class Combination:
    """A run that is compared."""

    run_dir: Path
    swept: Mapping[str, Any]
    """Its own settings by dotted key; all that are compared have the same keys."""
    failed: str | None = None
    """Why it has no result, in one line; "" once it has one."""

    def evaluations(self) -> list[Record]:
        lines = run_directory.read_lines(self.run_dir / run_directory.EVALUATIONS)
        return [{key: value for key, value in line.items() if value is not None} for line in lines]

    def value(self) -> float:
        """The headline metric of its last evaluation, higher is better; -inf where there is none."""
        return max(map(catalog.headline, self.evaluations()[-1:]), default=-math.inf)


def save_sweep(folder: Path, combinations: Sequence[Combination]) -> Path:
    """Write `sweep.json` there and the page; returns the page."""
    plain = {one.run_dir.name: {"swept": one.swept, "failed": one.failed} for one in combinations}
    write_text(folder / run_directory.SWEEP, json.dumps(plain, indent=2) + "\n")
    return write_comparison(combinations, folder / run_directory.REPORT)


def read_sweep(folder: Path) -> list[Combination]:
    saved = json.loads((folder / run_directory.SWEEP).read_text(encoding="utf-8"))
    return [Combination(folder / name, **one) for name, one in saved.items()]


def read_runs(run_dirs: Sequence[Path]) -> list[Combination]:
    """Raises UserError where one is no run."""
    settings = [dict(leaves(run_directory.settings(folder))) for folder in run_dirs]
    keys = dict.fromkeys(key for one in settings for key in one if key != "run.name")
    differ = [key for key in keys if any(one.get(key) != settings[0].get(key) for one in settings)]
    own = ({key: one.get(key) for key in differ} for one in settings)
    return [Combination(*of, "") for of in zip(run_dirs, own, strict=True)]


def write_comparison(runs: Sequence[Combination], page: Path) -> Path:
    """Write the page, best run first; returns its path."""
    ordered = sorted(runs, key=lambda one: (one.failed != "", -one.value()))
    named = {os.path.relpath(one.run_dir, page.parent): one for one in ordered}
    evaluated = {name: one.evaluations() for name, one in named.items()}
    trained = {name: run_directory.read_lines(one.run_dir / run_directory.METRICS) for name, one in named.items()}
    last = [line for lines in evaluated.values() for line in lines[-1:]]
    headlines = {one.name: f"{one.task}: {one.label}" for line in last for one in catalog.headlines(line).values()}
    drawn = [_overlaid(evaluated, name, f"Held-out {label}", "mean", marks=True) for name, label in headlines.items()]
    of = {name: catalog.CHARTS[catalog.DRAWN[name]] for name in COMPARED}
    drawn += [_overlaid(trained, name, one.title, one.unit, smooth=one.smooth) for name, one in of.items()]
    html = render(
        "sweep.html.j2",
        title=page.resolve().parent.name,
        runs=named,
        headlines=headlines,
        figures={name: [_figures(lines, metric) for metric in headlines] for name, lines in evaluated.items()},
        over_seeds=_over_seeds([one for one in runs if one.failed == "" and SEED in one.swept]),
        charts=[one for several in drawn for one in several],
        frame=charts,
    )
    write_text(page, html)
    return page


def _figures(lines: Sequence[Record], metric: str) -> dict[str, float | None]:
    """The metric in the first and the last evaluation, half its interval there, and its best value."""
    found = [line for line in lines if metric in line]
    values = [line[metric] for line in found]
    half = found[-1].get(catalog.interval(metric)) if found else None
    return {"first": values[0], "last": values[-1], "half": half, "best": max(values)} if found else {}


def _overlaid(
    of: Mapping[str, Sequence[Record]], metric: str, title: str, unit: str, **look: bool
) -> list[charts.Chart]:
    """Charts of the metric of every run."""
    curves = {name: {line["step"]: line.get(metric) for line in lines} for name, lines in of.items()}
    steps = sorted({step for curve in curves.values() for step in curve})
    rows = [{"step": step} | {name: curve.get(step) for name, curve in curves.items()} for step in steps]
    specs = spread(title, unit, {name: name for name in of}, **look)
    return [one for spec in specs if (one := chart(spec, rows)) is not None]


def _over_seeds(runs: Sequence[Combination]) -> dict[str, tuple[int, float, float]]:
    """What is set beside the seed -> number of seeds, mean of their values and half its 95 % t-interval."""
    found = defaultdict(list)
    for one in runs:
        found[", ".join(f"{key}={value}" for key, value in one.swept.items() if key != SEED)].append(one.value())
    several = {text: own for text, own in found.items() if len(own) > 1}
    return {text: (len(own), fmean(own), half_interval(own)) for text, own in several.items()}
