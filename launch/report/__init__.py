"""A run as one page: `write_report(run_dir)` or `python -m launch.report RUN_DIR`.

The page needs no network and no library: styles, one script, SVG curves and pictures are all inside it. What the policy
wrote is shown as text only; a content security policy lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from launch import rollouts, rundir
from launch.errors import UserError
from launch.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Spec, chart
from launch.report.gallery import Picture, pictures
from perception import names
from perception.types import FailureKind

Record = Mapping[str, Any]

_HERE = Path(__file__).parent
HELD_OUT_SHOWN = 8
TRAINING_SHOWN = 3
"""Groups of each training step shown."""
FAILURES_SHOWN = 6
_COLOURS = 6
"""Series one chart can tell apart."""
_FAILURE_FILES = 20
"""Failures are looked for in so many of the latest rollout files."""

_HEADLINE = {
    names.GIOU_GREEDY: "gIoU, greedy",
    names.GIOU_SAMPLED: "gIoU, sampled",
    names.HELD_OUT_PARSE_OK: "answers that parse",
}
_STAGES = {name: name.partition("/")[2] for name in names.STAGES}


@dataclass(frozen=True, slots=True)
class Change:
    """One line of the headline table."""

    label: str
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Pair:
    """The same held-out question before and after training."""

    before: Picture
    after: Picture


def write_report(run_dir: Path) -> Path:
    """Write `report.html` from what the run has recorded so far; returns its path.

    Raises UserError if the directory holds no run.
    """
    run_dir = Path(run_dir)
    if not (run_dir / rundir.CONFIG).is_file():
        raise UserError(
            f"{run_dir}: no run there ({rundir.CONFIG} missing); give the directory of a run, as in runs/quickstart"
        )
    config = yaml.safe_load((run_dir / rundir.CONFIG).read_text(encoding="utf-8"))
    metrics = rundir.read_lines(run_dir / rundir.METRICS)
    evaluations = rundir.read_lines(run_dir / rundir.EVALUATIONS)
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    page = _template().render(
        run=run_dir.resolve().name,
        config=dict(_flat(config)),
        environment=dict(_flat(_json(run_dir / rundir.ENVIRONMENT))),
        summary=_json(run_dir / rundir.SUMMARY),
        steps=len(metrics),
        seconds=sum(record.get(names.SECONDS_STEP) or 0.0 for record in metrics),
        changes=_changes(evaluations),
        eval_steps=[record["step"] for record in evaluations],
        charts=_charts(metrics, evaluations, config["reward"]),
        frame={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        pairs=_pairs(run_dir, config["reward"]),
        training=_training(run_dir, config["reward"]),
        failures=_failure_shares(metrics),
        failed=_failed(run_dir, config["reward"]),
        style=(_HERE / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    )
    path = run_dir / rundir.REPORT
    rundir.write_text(path, page)
    return path


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


def _json(path: Path) -> dict[str, Any]:
    """A JSON file's object, empty where the run has not written it yet."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _changes(evaluations: Sequence[Record]) -> list[Change]:
    if len(evaluations) < 2:
        return []
    first, last = evaluations[0], evaluations[-1]
    both = {n: label for n, label in _HEADLINE.items() if None not in (first.get(n), last.get(n))}
    return [Change(label, first[name], last[name]) for name, label in both.items()]


def _charts(metrics: Sequence[Record], evaluations: Sequence[Record], reward: Record) -> list[Chart]:
    components = [*reward["components"], *reward["ranked"]]
    failures = {names.failure(kind): kind.value for kind in FailureKind if kind.value in _failure_shares(metrics)}
    held_out = Spec(
        "Held-out gIoU", "mean IoU", {names.GIOU_SAMPLED: "sampled", names.GIOU_GREEDY: "greedy"}, marks=True
    )
    specs = (
        Spec("Reward", "mean per step", {names.REWARD_MEAN: "reward"}, smooth=True),
        Spec("Training gIoU", "mean IoU", {names.GIOU: "gIoU"}, smooth=True),
        *(
            Spec("Reward components", "mean raw value", {names.component(n): n for n in components[i : i + _COLOURS]})
            for i in range(0, len(components), _COLOURS)
        ),
        Spec("Time of a step", "seconds", _STAGES, stacked=True),
        Spec("Entropy", "nats per token", {names.ENTROPY: "entropy"}, smooth=True),
        Spec("Importance ratio", "learner / engine", {names.RATIO: "ratio"}),
        Spec("Engine against learner", "mean |log-prob difference|", {names.LOGPROB_MISMATCH: "mismatch"}),
        Spec("Clipped tokens", "share", {names.CLIP_LOW: "below the range", names.CLIP_HIGH: "above the range"}),
        Spec("KL to the reference", "nats per token", {names.KL: "KL"}),
        Spec("Gradient norm", "before clipping", {names.GRAD_NORM: "norm"}, smooth=True),
        Spec("Response length", "tokens, mean", {names.RESPONSE_TOKENS: "tokens"}, smooth=True),
        Spec("Boxes", "mean per sample", {names.BOXES_ANSWERED: "answered", names.BOXES_TRUE: "true"}),
        Spec("Spread of rewards", "standard deviation", {names.REWARD_STD: "reward"}, smooth=True),
        Spec("Groups with equal rewards", "share", {names.ZERO_VARIANCE: "share"}, smooth=True),
        Spec("Failed answers", "share", failures),
        Spec("Weight sync", "seconds", {names.SYNC_PAUSE: "engine paused", names.SYNC_TRANSFER: "transfer"}),
        Spec("Throughput", "sampled tokens / s", {names.TOKENS_PER_S: "tokens / s"}, smooth=True),
        Spec("Learning rate", "", {names.LR: "lr"}),
    )
    drawn = [chart(held_out, evaluations), *(chart(spec, metrics) for spec in specs)]
    return [one for one in drawn if one is not None]


def _files(run_dir: Path, phase: str) -> list[Path]:
    return sorted((run_dir / rundir.ROLLOUTS).glob(f"{phase}-*.parquet"))


def _pairs(run_dir: Path, reward: Record) -> list[Pair]:
    """The first held-out samples that both the first and the last evaluation kept: not chosen by how they came out."""
    files = _files(run_dir, "eval")
    if len(files) < 2:
        return []
    before, after = (pictures(rollouts.read(path), reward) for path in (files[0], files[-1]))
    later = {picture.sample_id: picture for picture in after}
    return [Pair(p, later[p.sample_id]) for p in before if p.sample_id in later][:HELD_OUT_SHOWN]


def _training(run_dir: Path, reward: Record) -> list[Picture]:
    """The first groups of the last recorded training step, then of the first."""
    files = _files(run_dir, "train")
    chosen = dict.fromkeys((*files[-1:], *files[:1]))
    return [picture for path in chosen for picture in pictures(rollouts.read(path), reward)[:TRAINING_SHOWN]]


def _failure_shares(metrics: Sequence[Record]) -> dict[str, tuple[float, float]]:
    """Kind -> (mean share over the run, share in the last tenth), kinds that occurred only."""
    recent = metrics[-max(1, len(metrics) // 10) :]
    shares = {}
    for kind in FailureKind:
        name = names.failure(kind)
        overall, late = ([record.get(name) or 0.0 for record in part] for part in (metrics, recent))
        if any(overall):
            shares[kind.value] = (sum(overall) / len(overall), sum(late) / len(late))
    return shares


def _failed(run_dir: Path, reward: Record) -> list[Picture]:
    """The latest failed answers, each as a picture with that one attempt."""
    found: list[Picture] = []
    for path in _files(run_dir, "train")[: -_FAILURE_FILES - 1 : -1]:
        rows = [row for row in rollouts.read(path) if row["failure"]]
        found += [picture for row in rows for picture in pictures([row], reward)]
        if len(found) >= FAILURES_SHOWN:
            break
    return found[:FAILURES_SHOWN]
