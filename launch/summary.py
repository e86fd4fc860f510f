"""What a run leaves on the terminal: before and after."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch import rundir


def show(run_dir: Path) -> None:
    """Print a finished run's before/after table and where to look next; for a stopped one, how to go on."""
    console = Console(width=100)
    if not (run_dir / rundir.SUMMARY).is_file():
        console.print(f"stopped with a checkpoint; go on with resume={run_dir.name}")
        return
    summary = json.loads((run_dir / rundir.SUMMARY).read_text())
    before, after = summary["before"], summary["after"]
    table = Table(
        title=f"{summary['steps']} GRPO steps, {summary['seconds']:.0f} s, {after['samples']} held-out scenes"
    )
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = (
        ("gIoU, greedy answers", "giou_greedy"),
        ("gIoU, sampled answers (T=1)", "giou_sampled"),
        ("parsed", "parse_ok"),
    )
    for label, key in rows:
        table.add_row(label, f"{before[key]:.3f}", f"{after[key]:.3f}", f"{after[key] - before[key]:+.3f}")
    console.print(table)
    console.print(f"policy   {run_dir / 'policy'}", soft_wrap=True)
