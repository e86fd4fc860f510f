"""What a run comes down to: before and after, here for the terminal and for the report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.record import run_directory
from perception import metric_catalog as catalog

_HEADLINE = {
    catalog.GIOU_GREEDY: "gIoU, greedy answers",
    catalog.GIOU_SAMPLED: "gIoU, sampled answers",
    catalog.HELD_OUT_PARSE_OK: "parsed",
    catalog.HELD_OUT_RELOOK_RATE: "looked at again",
    catalog.HELD_OUT_LOOK_GAIN: "mask IoU gained by looking again",
}


@dataclass(frozen=True, slots=True)
class Change:
    """One line of the table."""

    label: str
    before: float
    after: float


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """What both evaluations measured, the first held-out set before the further ones (`metric/set`)."""
    found = []
    for held_out in held_out_sets(before):
        for metric, label in _HEADLINE.items():
            name = catalog.held_out(metric, held_out)
            if _known(before.get(name)) and _known(after.get(name)):
                found.append(Change(f"{held_out}: {label}" if held_out else label, before[name], after[name]))
    return found


def held_out_sets(evaluation: Mapping[str, Any]) -> list[str]:
    """Names of the held-out sets in order of appearance; the first one has none and comes first."""
    return list(dict.fromkeys(["", *(name.partition("/")[2] for name in evaluation)]))


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
    scenes = after[catalog.HELD_OUT_SAMPLES]
    table = Table(title=f"{summary['steps']} GRPO steps, {summary['seconds']:.0f} s, {scenes} held-out scenes")
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="right" if heading else "left")
    for one in changes(before, after):
        table.add_row(one.label, f"{one.before:.3f}", f"{one.after:.3f}", f"{one.after - one.before:+.3f}")
    console.print(table)
    console.print(f"policy   {run_dir / 'policy'}", soft_wrap=True)
