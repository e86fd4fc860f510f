"""README's plugin: a user's own task, component, reader and loss in one file. Runs with plugins: test_cluster.py (a
package, submitted as a job) and test_boxes_only.py (this file, locally)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np

from runtime.cluster import ROOT
from tests.plugin_run import readme_plugin

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
(sample,) = load(config.data, config.data.train)
print(json.dumps([TASKS["find"].question(sample), sample.target.boxes.tolist()]))
answer = TASKS["find"].parse('<answer>[{"bbox_2d": [10, 20, 30, 36]}]</answer>')
print(reward_terms(config.reward)["edge_error"](case("", sample.target, answer=answer)))
tokens = SimpleNamespace(advantages=torch.tensor([2.0, -1.0]))
surrogate = SURROGATES[config.algorithm.loss](torch.tensor([-0.5, -1.0]), None, tokens, None)
print(surrogate.loss.tolist(), surrogate.clipped_low.any().item(), surrogate.clipped_high.any().item())
"""


def test_the_plugin_of_the_readme_is_whole(tmp_path: Path) -> None:
    """The settings beside it are accepted, and what it registers works; no worker is started."""
    plugin, settings = readme_plugin(tmp_path)
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((40, 60, 3), np.uint8))
    data = tmp_path / "table.txt"
    data.write_text("a.png;the red circle?;10;20;30;40\n")
    settings += [f"plugins=[{plugin}]", f"data.train={data}", f"data.eval={data}"]
    python = [sys.executable, "-c", PROGRAM, *settings]
    done = subprocess.run(python, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    question, reward, loss = done.stdout.splitlines()
    assert json.loads(question) == ["the red circle", [[10, 20, 30, 40]]]
    assert reward == "0.75" and loss == "[1.0, -1.0] False False"
