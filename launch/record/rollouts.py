"""Rollouts as a parquet table: one row per trajectory, readable by pandas, DuckDB and the Hugging Face viewer.

Coordinates are in pixels of the original image; masks are COCO run-length counts over (height, width). `picture` names
the image in `pictures/` beside the table, where each lies once per run, no larger than a report shows it; `image` says
where the image itself came from. A trajectory of several passes has one entry of `passes` for each; the other columns
describe the kept one.
"""

from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from perception import images
from perception.errors import DataError
from perception.files import replacing
from perception.grammar import clean
from perception.types import Candidate, Group, Rle, Sample, Trajectory, Turn

_COORDINATES = pa.list_(pa.list_(pa.float32()))
_PASS = {
    pa.string(): ("text", "mask"),
    pa.float64(): ("confidence", "mask_iou"),  # mask_iou null: masks were not compared
    pa.list_(pa.int32()): ("view",),  # left, top, right, bottom of what was shown enlarged; null: the whole image
    _COORDINATES: ("boxes", "points", "background"),  # points on the objects, and beside them
    pa.list_(pa.string()): ("labels",),  # of the boxes; empty where none was given
    pa.bool_(): ("kept",),
}
_TRAJECTORY = {
    pa.int32(): ("step", "index", "height", "width", "response_tokens"),
    pa.string(): ("sample_id", "task", "question", "text", "failure", "failure_detail", "image", "picture", "mask"),
    pa.float64(): ("reward", "advantage", "confidence"),
    pa.map_(pa.string(), pa.float64()): ("metrics",),
    pa.list_(pa.string()): ("turns", "labels", "truth_masks", "truth_texts"),
    _COORDINATES: ("boxes", "points", "background", "truth_boxes", "truth_points"),
    pa.list_(pa.int32()): ("policy_versions",),
}


def _columns(by_type: Mapping[pa.DataType, Sequence[str]]) -> list[tuple[str, pa.DataType]]:
    return [(name, kind) for kind, names in by_type.items() for name in names]


SCHEMA = pa.schema([*_columns(_TRAJECTORY), ("passes", pa.list_(pa.struct(_columns(_PASS))))])
_UNANSWERED: dict[str, Any] = {"text": "", "boxes": [], "points": [], "background": [], "labels": []}
_PICTURES = "pictures"
_SIDE = 1024  # pixels; a report shows less


def write(path: Path, step: int, groups: Sequence[Group]) -> None:
    """Write groups to `path`, whole or not at all."""
    rows = []
    for group in groups:
        shared = _group_columns(step, group.prompt.sample, path.parent)
        rows += [shared | _trajectory_columns(trajectory) for trajectory in group.trajectories]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        pq.write_table(table, scratch, compression="zstd")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of one file, columns as in SCHEMA, `metrics` as a dict, `picture` as a path."""
    rows = pq.read_table(path).to_pylist(maps_as_pydicts="strict")
    return [row | {"picture": path.parent / row["picture"] if row["picture"] else None} for row in rows]


def _store_picture(sample: Sample, folder: Path) -> str | None:
    name = f"{_PICTURES}/{images.source_key(sample.image)[:32]}"
    if not (folder / name).is_file():
        try:
            data = images.preview(images.read(sample.image), _SIDE)
        except (OSError, DataError):
            return None  # its trajectories say what failed
        (folder / _PICTURES).mkdir(parents=True, exist_ok=True)
        with replacing(folder / name) as scratch:
            scratch.write_bytes(data)
    return name


def _group_columns(step: int, sample: Sample, folder: Path) -> dict[str, Any]:
    asked = {"step": step, "sample_id": sample.id, "task": sample.task, "question": sample.question}
    shown = {"image": clean(str(sample.image)), "picture": _store_picture(sample, folder)}
    size, target = {"height": sample.height, "width": sample.width}, sample.target
    truth = {"truth_boxes": target.boxes.tolist(), "truth_points": target.points.tolist()}
    texts = {"truth_masks": [_text(mask) for mask in target.masks], "truth_texts": [target.text] if target.text else []}
    return asked | shown | size | truth | texts


def _trajectory_columns(trajectory: Trajectory) -> dict[str, Any]:
    score, failure = trajectory.score, trajectory.failure
    candidates = score.candidates if score else repeat(None)
    passes = [_pass(turn, one) for turn, one in zip(trajectory.turns, candidates, strict=False)]
    for index, one in enumerate(passes):
        one["kept"] = score is not None and index == score.kept
    kept = passes[score.kept if score else 0] if passes else _UNANSWERED
    versions = sorted({span.version for turn in trajectory.turns for span in turn.versions})
    turns = {"turns": [turn.text for turn in trajectory.turns], "passes": passes, "policy_versions": versions}
    measured = {"metrics": dict(score.metrics) if score else {}, "confidence": score.best.confidence if score else 0.0}
    return {
        **(kept | turns | measured | {"index": trajectory.index}),
        "response_tokens": trajectory.sampled_tokens,
        "reward": trajectory.reward,
        "advantage": trajectory.advantage if trajectory.reward is not None else None,
        "failure": failure.kind.value if failure else None,
        "failure_detail": clean(failure.detail) if failure else None,
    }


def _pass(turn: Turn, candidate: Candidate | None) -> dict[str, Any]:
    """What was answered in a pass, and what came of it where that could be measured."""
    view, objects = turn.view, candidate.answer.objects if candidate else ()
    measured = {name: getattr(candidate, name, None) for name in ("confidence", "mask_iou")}
    boxes, labels = [list(one.box) for one in objects if one.box], [one.label or "" for one in objects if one.box]
    points = [list(point) for one in objects for point in (one.point, *one.further) if point]
    places = {"boxes": boxes, "points": points, "background": [list(off) for one in objects for off in one.background]}
    shown = [view.left, view.top, view.right, view.bottom] if view else None
    mask = _text(candidate.mask) if candidate else None
    return {"text": turn.text, "view": shown, "labels": labels, "mask": mask, **places, **measured}


def _text(mask: Rle | None) -> str | None:
    return mask.counts.decode("ascii") if mask else None
