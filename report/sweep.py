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
from launch.run.command_line import leaves
from perception import metric_catalog as catalog
from perception.files import write_text
from report import charts
from report.charts import Chart, chart
from report.curves import Record, spread
from report.page import render

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
    saved = (folder / run_directory.SWEEP).read_text(encoding="utf-8")
    return [Combination(folder / name, **one) for name, one in json.loads(saved).items()]


def read_runs(run_dirs: Sequence[Path]) -> list[Combination]:
    """Raises UserError where one is no run."""
    settings = {folder: dict(leaves(run_directory.settings(folder))) for folder in run_dirs}
    keys = dict.fromkeys(key for one in settings.values() for key in one if key != "run.name")
    differ = [key for key in keys if len({repr(one.get(key)) for one in settings.values()}) > 1]
    return [Combination(folder, {key: one.get(key) for key in differ}, "") for folder, one in settings.items()]


def write_comparison(runs: Sequence[Combination], page: Path) -> Path:
    """Write the page, best run first; returns its path."""
    named = {os.path.relpath(one.run_dir, page.parent): one for one in sorted(runs, key=lambda one: -one.value())}
    evaluated = {name: one.evaluations() for name, one in named.items()}
    trained = {name: run_directory.read_lines(one.run_dir / run_directory.METRICS) for name, one in named.items()}
    judged = catalog.headlines(key for lines in evaluated.values() for line in lines[-1:] for key in line).values()
    shown = {one.name: catalog.Chart(f"Held-out {one.task}: {one.label}", "mean") for one in judged}
    drawn = [_overlaid(evaluated, name, one, True) for name, one in shown.items()]
    drawn += [_overlaid(trained, name, catalog.CHARTS[catalog.DRAWN[name]], False) for name in COMPARED]
    html = render(
        "sweep.html.j2",
        title=page.resolve().parent.name,
        runs=named,
        judged=judged,
        figures={name: [_figures(lines, one) for one in judged] for name, lines in evaluated.items()},
        over_seeds=_over_seeds([one for one in runs if one.failed == "" and SEED in one.swept]),
        charts=[one for several in drawn for one in several],
        frame=charts,
    )
    write_text(page, html)
    return page


def _figures(lines: Sequence[Record], metric: catalog.HeldOut) -> dict[str, float | None]:
    """The metric in the first and the last evaluation, half its interval there, and its best value."""
    values = [line[metric.name] for line in lines if metric.name in line]
    half = lines[-1].get(metric._replace(way=catalog.INTERVAL).name) if lines else None
    return {"first": values[0], "last": values[-1], "half": half, "best": max(values)} if values else {}


def _overlaid(of: Mapping[str, Sequence[Record]], metric: str, shown: catalog.Chart, marks: bool) -> list[Chart]:
    """The metric of every run, in as many charts as that takes."""
    curves = {name: {line["step"]: line.get(metric) for line in lines} for name, lines in of.items()}
    steps = sorted({step for curve in curves.values() for step in curve})
    rows = [{"step": step} | {name: curve.get(step) for name, curve in curves.items()} for step in steps]
    specs = spread(shown.title, shown.unit, dict(zip(of, of, strict=True)), smooth=shown.smooth, marks=marks)
    return [one for spec in specs if (one := chart(spec, rows)) is not None]


def _over_seeds(runs: Sequence[Combination]) -> dict[str, tuple[int, float, float]]:
    """What is set beside the seed -> number of seeds, mean of their values and half its 95 % t-interval."""
    found = defaultdict(list)
    for one in runs:
        found[", ".join(f"{key}={value}" for key, value in one.swept.items() if key != SEED)].append(one.value())
    return {text: (len(own), fmean(own), half_interval(own)) for text, own in found.items() if len(own) > 1}
