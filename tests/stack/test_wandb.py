"""W&B for real: offline runs by its own process, read back by its own reader (`wandb leet inspect`)."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from docs.wandb_workspace import PICTURES, TABLES
from launch.record import trackers
from launch.record.recorder import Recorder
from perception import metric_catalog as catalog
from perception.types import Group
from tests.builders import changed
from tests.fake_run import LOOK, SIDE, N, config, scene_group

CLASSES = {"truth": 1, "answer": 2, "second look": 3}
Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> list[Group]:
    folder = tmp_path_factory.mktemp("images")
    return [scene_group(folder, seed, 13.0, np.random.default_rng(seed), LOOK) for seed in (12, 13)]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, groups: list[Group]) -> Path:
    """A run of three steps, resumed from its second one as if it had died; each part is a file of W&B's own."""
    output = tmp_path_factory.mktemp("runs")
    data = output / "train.json"
    data.write_text("[]")
    settings = changed(changed(config(output), "wandb", mode="offline", pictures_every=2), "data", train=str(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trackers, "CLOSE_TIMEOUT_S", 180.0)  # a busy machine starts W&B slowly
        with Recorder(settings) as recorder:
            recorder.evaluation(0, {"segment/mask_iou/greedy": 0.5}, groups)
            for step in (1, 2, 3):
                recorder.step(step, {catalog.REWARD_MEAN: step / 4, catalog.ENTROPY: float("nan")}, groups)
            recorder.alert("nothing parses", "step 3: what was written")
        with Recorder(changed(settings, "run", resume="quickstart"), resume_step=2) as recorder:
            recorder.step(3, {catalog.REWARD_MEAN: 8.0}, groups)
            (recorder.run_dir / "policy").mkdir()
            (recorder.run_dir / "policy" / "config.json").write_text("{}")
            recorder.summary({})
            recorder.exported(recorder.run_dir / "policy")
    return recorder.run_dir


@pytest.fixture(scope="module")
def parts(run_dir: Path) -> list[Records]:
    """What W&B's reader finds in each file, the older first."""
    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    return [read(file) for file in files]


def read(file: Path) -> Records:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    return [json.loads(line) for line in subprocess.check_output(command, text=True).splitlines()]


def of(kind: str, records: Records) -> Records:
    return [record[kind] for record in records if record["type"] == kind]


def history(records: Records) -> dict[int, dict[str, Any]]:
    return {one["item"]["_step"]: one["item"] for one in of("history", records)}


def test_metrics_stand_under_their_catalogue_names_beside_the_settings(parts: list[Records]) -> None:
    found = history(parts[0])
    assert [found[step].get(catalog.REWARD_MEAN) for step in (0, 1, 2, 3)] == [None, 0.25, 0.5, 0.75]
    assert found[0]["eval/segment/mask_iou/greedy"] == 0.5
    (settings, *_) = of("config", parts[0])
    assert settings["update"]["algorithm"]["group_size"] == 8


def test_a_resumed_run_is_the_same_one_and_whole(parts: list[Records]) -> None:
    first, second = ((of("run", part) or [{}])[0]["run_id"] for part in parts)
    assert first == second
    found = history(parts[1])
    assert [found[step].get(catalog.REWARD_MEAN) for step in (0, 1, 2, 3)] == [None, 0.25, 0.5, 8.0]
    assert found[0]["eval/segment/mask_iou/greedy"] == 0.5 and "rollouts/train_pictures.all_boxes" in found[2]


def test_pictures_have_the_boxes_and_masks_of_truth_answer_and_second_look(
    run_dir: Path, parts: list[Records], groups: list[Group]
) -> None:
    item, files = history(parts[0])[2], next(run_dir.glob("wandb/offline-run-*/files"))
    for place, group in enumerate(groups):
        best = max(group.trajectories, key=lambda one: one.reward or 0.0)
        assert best.score is not None
        answered = {"answer": best.score.candidates[0], "second look": best.score.candidates[-1]}
        expected = {name: [one.box for one in answer.answer.objects] for name, answer in answered.items()}
        expected["truth"] = group.prompt.sample.target.boxes.tolist()
        boxes = item["rollouts/train_pictures.all_boxes"][place]
        for name, corners in expected.items():
            drawn = json.loads((files / boxes[name]["path"]).read_text())["box_data"]
            assert {box["class_id"] for box in drawn} <= {CLASSES[name]}
            found = [[box["position"][key] * SIDE for key in ("minX", "minY", "maxX", "maxY")] for box in drawn]
            assert np.allclose(found, corners, atol=1e-3), name
        for name, mask in item["rollouts/train_pictures.all_masks"][place].items():
            assert set(np.unique(cv2.imread(str(files / mask["path"]), cv2.IMREAD_UNCHANGED))) == {0, CLASSES[name]}
    assert all("truth" in masks for masks in item["rollouts/train_pictures.all_masks"])
    assert "rollouts/train_pictures.all_boxes" not in history(parts[0])[3], "every second step, as the settings say"


def test_answers_are_a_table_whose_pictures_lie_in_the_runs_directory(run_dir: Path, parts: list[Records]) -> None:
    assert history(parts[0])[0]["rollouts/eval_answers.nrows"] == 2 * N
    assert {"rollouts/eval_answers.nrows", "rollouts/train_answers.nrows"} == {f"{key}.nrows" for key in TABLES}
    assert all(any(f"{key}.filenames" in item for item in history(parts[0]).values()) for key in PICTURES)
    tables = [one for one in of("artifact", parts[0]) if one["type"] == "run_table"]
    staged = [Path(file["local_path"]) for one in tables for file in one["manifest"]["contents"]]
    assert staged and all(path.is_relative_to(run_dir) and path.is_file() for path in staged)


def test_data_and_policy_are_artifacts_of_names_and_hashes(parts: list[Records]) -> None:
    found = {one["type"]: one["manifest"]["contents"] for one in of("artifact", parts[1])}
    for kind, name, content in (("data", "train.json", b"[]"), ("policy", "policy/config.json", b"{}")):
        (file,) = found[kind]
        assert file["path"] == name and "local_path" not in file
        assert file["digest"] == base64.b64encode(hashlib.md5(content).digest()).decode()


def test_alerts_are_sent(parts: list[Records]) -> None:
    (alert,) = of("alert", parts[0])
    assert (alert["title"], alert["text"], alert["level"]) == ("nothing parses", "step 3: what was written", "WARN")
