"""A user's own task, component, reader and loss, from a package outside this repository of which no file changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from launch import world
from perception.config import DataConfig
from perception.datasets import load
from runtime.cluster import ROOT

PLUGIN = ROOT / "tests/plugin/my_perception"


def write_table(folder: Path, split: str, count: int) -> Path:
    """The first questions of the synthetic world that mean one object, in the plugin's own layout: boxes in shares."""
    source = folder / "world" / f"{split}.json"
    samples = load(DataConfig(format="coco", train=str(source), eval=str(source)), "train")
    lines = []
    for sample in samples:
        if sample.target.count == 1:
            corners = " ".join(f"{value / sample.width:.6f}" for value in sample.target.boxes[0])
            lines.append(f"{Path(sample.image_path).relative_to(folder)}|{sample.question}?|{corners}")
    table = folder / f"{split}.txt"
    table.write_text("\n".join(lines[:count]))
    return table


def test_a_package_elsewhere_brings_task_component_reader_and_loss(tmp_path: Path) -> None:
    plugin = shutil.copytree(PLUGIN, tmp_path / "elsewhere" / "my_perception")
    world.write(tmp_path / "world", train=16, eval=8)
    data = {split: write_table(tmp_path, split, count) for split, count in (("train", 8), ("eval", 4))}
    command = [
        *(sys.executable, "-m", "launch.train", "--config-dir", str(plugin / "conf"), "recipe=mine"),
        *(f"plugins=[{plugin}]", *(f"data.{split}={path}" for split, path in data.items())),
        *("algorithm.steps=2", "algorithm.prompts_per_step=4", "algorithm.group_size=4", "learner.lr=1e-3"),
        f"run.output={tmp_path}/runs",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "mine"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2]
    for row in metrics:
        assert 0 < row["component/centre_distance"] <= 1 and 0 <= row["component/box_iou"] <= 1
        expected = 2 * row["component/centre_distance"] + row["component/box_iou"]  # every answer was measured
        assert abs(row["reward/mean"] - expected) < 1e-9
        assert row["policy/clip_low"] == row["policy/clip_high"] == 0
    after = json.loads((run / "summary.json").read_text())["after"]
    assert {"corners/box_accuracy/greedy", "corners/centre_distance/sampled", "corners/samples/sampled"} <= after.keys()
    before, trained = (load_file(folder / "model.safetensors") for folder in (ROOT / "assets/policy", run / "policy"))
    assert np.mean([not np.array_equal(before[name], trained[name]) for name in before]) > 0.9
