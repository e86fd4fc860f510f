"""Report of a run as one HTML page: `write_report(run_dir)` or `python -m launch.report RUN_DIR`; of a sweep, too.

The page needs no network and no library: styles, one script, SVG curves and pictures are all inside it. What the policy
wrote is shown as text only; a content security policy lets no other script run.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from launch.record import rollouts, run_directory
from launch.record.summary import changes
from launch.run.command_line import leaves
from perception import metric_catalog as catalog
from perception.errors import UserError
from perception.files import write_text
from perception.types import FailureKind
from report import charts
from report.curves import Record, curves
from report.gallery import Picture, Row, pictures
from report.page import render
from report.sweep import read_sweep, write_comparison

Draw = Callable[[Sequence[Row]], list[Picture]]

HELD_OUT_SHOWN = 8
TRAINING_SHOWN = 3
"""Groups of each training step shown."""
FAILURES_SHOWN = 6
STRETCHES_SHOWN = 3000
"""The last stretches of the timeline are drawn, as many as this."""
_FAILURE_FILES = 20
"""Failures are looked for in so many of the latest rollout files."""


def write_report(run_dir: Path) -> Path:
    """Write `report.html` from what the run, or the sweep, has recorded so far; returns its path. A run's
    `timeline.json` is for Perfetto.

    Raises UserError if the directory holds neither.
    """
    run_dir = Path(run_dir)
    if (run_dir / run_directory.SWEEP).is_file():
        return write_comparison(read_sweep(run_dir), run_dir / run_directory.REPORT)
    if not (run_dir / run_directory.CONFIG).is_file():
        why = f"no run there ({run_directory.CONFIG} missing)"
        raise UserError(f"{run_dir}: {why}; name a run's directory, as runs/quickstart")
    config = run_directory.settings(run_dir)
    metrics = run_directory.read_lines(run_dir / run_directory.METRICS)
    evaluations = run_directory.read_lines(run_dir / run_directory.EVALUATIONS)
    timeline = run_directory.read_lines(run_dir / run_directory.TIMELINE)
    failures = _failure_shares(metrics)
    reward = config["reward"]
    draw: Draw = partial(pictures, reward=reward, pixels=config["look"]["pixels"])
    pairs, training, failed = _pairs(run_dir, draw), _training(run_dir, draw), _failed(run_dir, draw)
    page = render(
        "report.html.j2",
        run=run_dir.resolve().name,
        config=dict(leaves(config)),
        environment=dict(leaves(_json(run_dir / run_directory.ENVIRONMENT))),
        summary=_json(run_dir / run_directory.SUMMARY),
        steps=len(metrics),
        seconds=sum(record.get(catalog.SECONDS_STEP) or 0.0 for record in metrics),
        changes=changes(evaluations[0], evaluations[-1]) if len(evaluations) > 1 else [],
        eval_steps=[record["step"] for record in evaluations],
        charts=curves(metrics, evaluations, (*reward["components"], *reward["ranked"]), failures),
        frame=charts,
        timeline=timeline[-STRETCHES_SHOWN:],
        pairs=pairs,
        training=training,
        failures=failures,
        failed=failed,
        looked_again=any(one.passes for shown in chain(*pairs, training, failed) for one in shown.attempts),
    )
    write_text(run_dir / run_directory.REPORT, page)
    write_text(run_dir / run_directory.TRACE, json.dumps({"traceEvents": timeline}))
    return run_dir / run_directory.REPORT


def _json(path: Path) -> dict[str, Any]:
    """A JSON file's object, empty where the run has not written it yet."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _files(run_dir: Path, phase: str) -> list[Path]:
    return sorted((run_dir / run_directory.ROLLOUTS).glob(f"{phase}-*.parquet"))


def _pairs(run_dir: Path, draw: Draw) -> list[tuple[Picture, Picture]]:
    """Held-out questions before and after training: the first that both the first and the last evaluation kept, not
    chosen by how they came out."""
    files = _files(run_dir, "eval")
    if len(files) < 2:
        return []
    before, after = (draw(rollouts.read(path)) for path in (files[0], files[-1]))
    later = {picture.sample_id: picture for picture in after}
    return [(p, later[p.sample_id]) for p in before if p.sample_id in later][:HELD_OUT_SHOWN]


def _training(run_dir: Path, draw: Draw) -> list[Picture]:
    """The first groups of the last recorded training step, then of the first."""
    files = _files(run_dir, "train")
    chosen = dict.fromkeys((*files[-1:], *files[:1]))
    return [picture for path in chosen for picture in draw(rollouts.read(path))[:TRAINING_SHOWN]]


def _failure_shares(metrics: Sequence[Record]) -> dict[str, tuple[float, float]]:
    """Kind -> (mean share over the run, share in the last tenth), kinds that occurred only."""
    shares = {kind.value: [record.get(catalog.failure(kind)) or 0.0 for record in metrics] for kind in FailureKind}
    recent = max(1, len(metrics) // 10)
    return {kind: (fmean(one), fmean(one[-recent:])) for kind, one in shares.items() if any(one)}


def _failed(run_dir: Path, draw: Draw) -> list[Picture]:
    """The latest failed answers, each as a picture with that one attempt."""
    found: list[Picture] = []
    for path in _files(run_dir, "train")[: -_FAILURE_FILES - 1 : -1]:
        rows = [row for row in rollouts.read(path) if row["failure"]]
        found += [picture for row in rows for picture in draw([row])]
        if len(found) >= FAILURES_SHOWN:
            break
    return found[:FAILURES_SHOWN]
