"""A user's own task, component, reader and loss, from a package outside this repository of which no file changes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
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


PROGRAM = """
import json, sys, torch
from types import SimpleNamespace
from learner.loss import SURROGATES
from launch.run.checks import check_registered
from launch.run.config import compose
from perception.datasets import load
from perception.registry import find_plugins
from perception.tasks import TASKS
from reward_workers.components import reward_terms
from tests.builders import case

config = compose(["recipe=quickstart", *sys.argv[1:]])
find_plugins(config.plugins)
check_registered(config)
(sample,) = load(config.data, "train")
print(json.dumps([TASKS["find"].question(sample), sample.target.boxes.tolist()]))
answer = TASKS["find"].parse('<answer>[{"bbox_2d": [10, 20, 30, 36]}]</answer>')
print(reward_terms(config.reward)["edge_error"](case("", sample.target, answer=answer)))
tokens = SimpleNamespace(advantages=torch.tensor([2.0, -1.0]))
surrogate = SURROGATES[config.algorithm.loss](torch.tensor([-0.5, -1.0]), None, tokens, None)
print(surrogate.loss.tolist(), surrogate.clipped_low.any().item(), surrogate.clipped_high.any().item())
"""


def test_the_plugin_of_the_readme_is_whole(tmp_path: Path) -> None:
    """The settings beside it are accepted, and what it registers works; no worker is started."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "mine.py").write_text(text.split("```python\n")[1].split("```")[0], encoding="utf-8")
    command = text.split("    python -m launch.train recipe=quickstart plugins=[mine.py]")[1].split("\n\n")[0]
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((40, 60, 3), np.uint8))
    data = tmp_path / "table.txt"
    data.write_text("a.png;the red circle?;10;20;30;40\n")
    settings = [word for word in shlex.split(command) if word.strip()]
    settings += [f"plugins=[{tmp_path}/mine.py]", f"data.train={data}", f"data.eval={data}"]
    python = [sys.executable, "-c", PROGRAM, *settings]
    done = subprocess.run(python, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    question, reward, loss = done.stdout.splitlines()
    assert json.loads(question) == ["the red circle", [[10, 20, 30, 40]]]
    assert reward == "0.75" and loss == "[1.0, -1.0] False False"
