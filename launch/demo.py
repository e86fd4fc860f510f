"""`make demo`: train on the synthetic world, print before and after.

python -m launch.demo [steps=120] [seed=42]
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch import rundir
from launch.arguments import call
from launch.cluster import ROOT

RUN = "quickstart"


def demo(steps: int | None = None, seed: int | None = None) -> None:
    """Runs in the project's folder, whatever the current one."""
    overrides = [f"recipe={RUN}"]
    overrides += [f"algorithm.steps={steps}"] if steps is not None else []
    overrides += [f"run.seed={seed}"] if seed is not None else []
    finished = subprocess.run([sys.executable, "-m", "launch.train", *overrides], cwd=ROOT)
    if finished.returncode:
        sys.exit(finished.returncode)
    show(ROOT / "runs" / RUN)


def show(run_dir: Path) -> None:
    """The before/after table and where to look next."""
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
    console = Console(width=100)
    console.print(table)
    console.print(f"report   {run_dir / rundir.REPORT}", soft_wrap=True)
    console.print(f"policy   {run_dir / 'policy'}", soft_wrap=True)


if __name__ == "__main__":
    call(demo)
