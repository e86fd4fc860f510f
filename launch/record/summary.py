"""Summary of a run: held-out metrics before and after, for the terminal and for the report."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy.special import stdtrit

from launch.record import run_directory
from perception import metric_catalog as catalog


@dataclass(frozen=True, slots=True)
class Change:
    """One line of the table."""

    label: str
    before: float
    after: float


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """What both evaluations measured, the first held-out set before the further ones; tasks are named where there are
    several."""
    measured = [one for one in catalog.read_held_out(before) if one.measure != catalog.SAMPLES]
    tasks = {one.task for one in measured}
    found = []
    for one in sorted(measured, key=lambda one: one.held_out != ""):
        if _known(before.get(one.name)) and _known(after.get(one.name)):
            label = f"{one.task}: {one.label}" if len(tasks) > 1 else one.label
            found.append(Change(label, before[one.name], after[one.name]))
    return found


def samples(evaluation: Mapping[str, Any]) -> int:
    """Held-out samples of the set a run is judged by, all tasks together."""
    counts = [one for one in catalog.read_held_out(evaluation) if one.measure == catalog.SAMPLES and not one.held_out]
    return sum(int(evaluation[one.name]) for one in counts)


def half_interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % t-interval of the mean of two or more values."""
    return float(stdtrit(len(values) - 1, 0.975) * stdev(values) / math.sqrt(len(values)))


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def show(run_dir: Path) -> None:
    """Print a finished run's before/after table and where to look next; for a stopped one, how to go on."""
    console = Console(width=100)
    if not (run_dir / run_directory.SUMMARY).is_file():
        console.print(f"stopped with a checkpoint; go on with run.resume={run_dir.name}")
        return
    summary = json.loads((run_dir / run_directory.SUMMARY).read_text())
    before, after = summary["before"], summary["after"]
    title = f"{summary['steps']} GRPO steps, {summary['seconds']:.0f} s, {samples(after)} held-out samples"
    table = Table(title=title, caption=f"data: {summary['data']}" if "data" in summary else None)
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="right" if heading else "left")
    for one in changes(before, after):
        table.add_row(one.label, f"{one.before:.3f}", f"{one.after:.3f}", f"{one.after - one.before:+.3f}")
    console.print(table)
    if restarts := {role: count for role, count in summary["restarts"].items() if count}:
        console.print("restarted " + ", ".join(f"{role} {count}x" for role, count in restarts.items()))
    if left_out := summary.get("left_out"):
        console.print("left out " + ", ".join(f"{count} {reason}" for reason, count in left_out.items()) + " records")
    console.print(f"policy   {(run_dir / 'policy').resolve()}", soft_wrap=True)
