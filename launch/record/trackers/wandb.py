"""Weights & Biases: metrics, pictures with truth and answers, tables of answers, hashes of data and policy, alerts.

It never asks: without a login the run stays offline, for `wandb sync`.
"""

import netrc
import os
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import cv2
import numpy as np

from launch.record import rollouts, run_directory
from launch.record.trackers import EVALUATED, TRACKERS, Tracked, Tracker
from perception import images
from perception.config import Config, WandbConfig
from report.drawing import mask_of

_SERVICE_WAIT_S = 120.0  # for W&B's own process to start; nobody waits for it but the thread
_CLASSES = {1: "truth", 2: "answer", 3: "second look"}
_COLUMNS = ("sample_id", "task", "question", "text", "reward", "advantage", "confidence", "failure", "failure_detail")


def logged_in() -> bool:
    """An API key is at hand, in the environment or in the user's netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host is not None and netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def resolved_mode(config: WandbConfig) -> str:
    """auto -> $WANDB_MODE if it is set, else online when logged in, else offline."""
    if config.mode != "auto":
        return config.mode
    return os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")


@TRACKERS.register("wandb")
class Wandb(Tracker):
    package = "wandb"

    def __init__(self, run: Tracked) -> None:
        folder, config, mode = run.run_dir.resolve(), run.config.wandb, resolved_mode(run.config.wandb)
        os.environ["WANDB_SILENT"] = "true"
        os.environ["WANDB_DATA_DIR"] = str(folder / "wandb" / "data")  # what is synced later goes where the run goes
        import wandb

        self._every = config.pictures_every
        self._run = wandb.init(
            project=config.project,
            name=folder.name,
            id=_run_id(folder),
            resume="allow" if mode == "online" else None,
            dir=folder,
            mode=mode,  # type: ignore[arg-type]
            config=dict(run.settings),
            settings=wandb.Settings(silent=True, console="off", init_timeout=60, x_service_wait=_SERVICE_WAIT_S),
        )
        if mode == "offline" and run.resume_step is not None:
            self._tell_again(folder)

    @staticmethod
    def wanted(config: Config) -> bool:
        return resolved_mode(config.wandb) != "disabled"

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        self._run.log(dict(metrics), step=step)

    def rollouts(self, step: int, table: Path) -> None:
        """A picture of each group with its best answer, and every answer as a row."""
        import wandb

        phase = table.stem.partition("-")[0]
        if phase == "train" and step % self._every:
            return
        pictures, answers = [], wandb.Table(columns=["picture", *_COLUMNS])
        for _, group in groupby(rollouts.read(table), key=lambda row: row["sample_id"]):
            rows = sorted(group, key=lambda row: -(row["reward"] or 0.0))
            picture = _picture(rows[0])
            pictures += [picture] if picture else []
            for row in rows:
                answers.add_data(picture, *(row[name] for name in _COLUMNS))
        self._run.log({f"rollouts/{phase}_pictures": pictures, f"rollouts/{phase}_answers": answers}, step=step)

    def artifact(self, kind: str, paths: Sequence[Path]) -> None:
        """Names, sizes and hashes; the files themselves stay where they are."""
        import wandb

        artifact = wandb.Artifact(f"{kind}-{self._run.id}", type=kind)
        for path in paths:
            artifact.add_reference(path.resolve().as_uri(), name=path.name)
        self._run.log_artifact(artifact)

    def alert(self, title: str, text: str) -> None:
        self._run.alert(title, text, level="WARN")

    def close(self) -> None:
        self._run.finish()

    def _tell_again(self, folder: Path) -> None:
        """An offline run that goes on is a file of its own, with the same id: it holds what came before, too, so that
        it is whole however W&B joins the two."""
        records: dict[int, dict[str, float | None]] = defaultdict(dict)
        for name, prefix in ((run_directory.METRICS, ""), (run_directory.EVALUATIONS, EVALUATED)):
            for record in run_directory.read_lines(folder / name):
                records[record.pop("step")] |= {prefix + key: value for key, value in record.items()}
        for step in sorted(records):
            self.log(step, records[step])
            for table in sorted((folder / run_directory.ROLLOUTS).glob(f"*-{step:06d}.parquet")):
                self.rollouts(step, table)


def _run_id(run_dir: Path) -> str:
    """The same W&B run when a run is resumed; of a W&B sweep, the one that its agent names."""
    path = run_dir / "wandb_id"
    if not path.is_file():
        path.write_text(os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12])
    return path.read_text().strip()


def _picture(row: Mapping[str, Any]) -> Any:
    """The row's image with boxes and masks as W&B draws them; None where the image could not be read."""
    import wandb

    if row["picture"] is None:
        return None
    image = images.decode(row["picture"].read_bytes())
    true = {"boxes": row["truth_boxes"], "masks": row["truth_masks"]}
    looks = [{"boxes": one["boxes"], "masks": [one["mask"]] if one["mask"] else []} for one in row["passes"]]
    shown = dict(enumerate([true, *looks[:1], *looks[1:][-1:]], start=1))
    return wandb.Image(
        image,
        caption=f"{row['question']}  reward {row['reward']}",
        boxes={_CLASSES[kind]: _boxes(kind, one["boxes"], row) for kind, one in shown.items()},
        masks={_CLASSES[kind]: _mask(kind, one["masks"], row, image) for kind, one in shown.items() if one["masks"]},
    )


def _boxes(kind: int, boxes: Sequence[Sequence[float]], row: Mapping[str, Any]) -> dict[str, Any]:
    """In shares of the image's size: it was stored smaller than the original, whose pixels the boxes are in."""
    width, height = row["width"], row["height"]
    corners = ((x1 / width, x2 / width, y1 / height, y2 / height) for x1, y1, x2, y2 in boxes)
    places = [dict(zip(("minX", "maxX", "minY", "maxY"), one, strict=True)) for one in corners]
    return {"box_data": [{"position": one, "class_id": kind} for one in places], "class_labels": _CLASSES}


def _mask(kind: int, masks: Sequence[str], row: Mapping[str, Any], image: np.ndarray) -> dict[str, Any]:
    union = np.any([mask_of(counts, row["height"], row["width"]) for counts in masks], axis=0)
    small = cv2.resize(union.astype(np.uint8) * kind, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    return {"mask_data": small, "class_labels": _CLASSES}
