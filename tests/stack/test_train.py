"""The whole path for real: train, stop on Ctrl-C with a checkpoint, go on, finish, and leave what was promised."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from perception import metric_catalog as catalog
from perception.metric_catalog import GREEDY, HeldOut
from runtime.cluster import ROOT

START_S = 240.0
HELD_OUT = HeldOut("segment", "mask_iou")
SMALL = (
    "recipe=quickstart",
    "algorithm.prompts_per_step=4",
    "algorithm.group_size=4",
    "learner.micro_tokens=1024",
    "learner.schedule=constant",
    "data.eval_samples=4",
    "reward=dr_seg",
    "look=relook",
    "look.calibration=16",
    "run.deterministic=true",
    "run.checkpoint_every=2",
    "run.profile_steps=2:2",
    "run.name=small",
)


def launch(output: Path, *words: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "launch.train", f"run.output={output}", *words]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small one, which the first run writes."""
    folder = tmp_path_factory.mktemp("data") / "world"
    return ["data.world_train=128", *(f"data.{split}={folder}/{split}.json" for split in ("train", "eval"))]


@pytest.fixture(scope="module")
def stopped(world: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 1000 steps that was told to stop during its fifth one, or soon after."""
    output = tmp_path_factory.mktemp("runs")
    process = launch(output, *SMALL, *world, "algorithm.steps=1000")
    deadline = time.monotonic() + START_S
    try:
        while len(steps(output / "small")) < 4 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "parity: mean importance ratio 1.0000" in out and "go on with run.resume=small" in out
    told = ["reading and checking the data", "starting Ray", "writing the traces", "writing the checkpoint of step 4"]
    assert [line for line in out.splitlines() if line in told] == told
    assert re.search(r"stopping: step \d+ is finished and a checkpoint written first; another Ctrl-C", out)
    return output / "small"


def test_before_the_first_step_a_signal_ends_the_run_at_once(world: list[str], tmp_path: Path) -> None:
    process = launch(tmp_path, *SMALL, *world, "algorithm.steps=1000")
    try:
        assert process.stdout is not None
        assert any("starting engine" in line for line in process.stdout)
        group = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)  # starting alone would take longer
    finally:
        process.kill()
    assert process.returncode == 130 and err.strip().splitlines()[-1] == "stopped: by a signal, at once"
    psutil.wait_procs([psutil.Process(pid) for pid in group if psutil.pid_exists(pid)], timeout=10)
    assert not [pid for pid in group if psutil.pid_exists(pid)]


def test_ctrl_c_ends_the_run_after_the_step_with_a_checkpoint(stopped: Path) -> None:
    done = steps(stopped)
    assert done == list(range(1, len(done) + 1)) and 4 <= len(done) < 100
    assert json.loads((stopped / f"checkpoints/step-{done[-1]:06d}/state.json").read_text())["step"] == done[-1]
    assert not (stopped / "summary.json").exists()


def test_a_profiled_step_leaves_a_trace_of_each_role(stopped: Path) -> None:
    computed = {}
    for role in ("engine", "reward", "learner"):
        trace = json.loads(gzip.decompress((stopped / f"profile/{role}.json.gz").read_bytes()))
        computed[role] = {one["name"] for one in trace["traceEvents"] if one["ph"] == "X"}
    assert "aten::linear" in computed["engine"] and "aten::conv2d" in computed["reward"]
    assert 1 < len([name for name in computed["engine"] if name.startswith("ProfilerStep#")]) <= 64
    assert {"aten::mm", "MmBackward0"} <= computed["learner"] and "MmBackward0" not in computed["engine"]


def test_the_timeline_has_every_step_of_every_role(stopped: Path) -> None:
    events = json.loads((stopped / "timeline.json").read_text())["traceEvents"]
    done = {(one["pid"], one["name"]): one for one in events}
    for step in steps(stopped):
        own = [one for one in events if one["step"] == step]
        assert {("controller", f"step {step}"), ("rollout engine 0", "sample"), ("reward worker 0", "score")} <= {
            (one["pid"], one["name"]) for one in own
        }
        whole = done["controller", f"step {step}"]
        update = next(one for one in own if (one["pid"], one["name"]) == ("learner rank 1", "update"))
        assert whole["ts"] <= update["ts"] < update["ts"] + update["dur"] <= whole["ts"] + whole["dur"]
    assert {"writing the traces", "evaluating the starting policy"} <= {name for _, name in done}


@pytest.fixture(scope="module")
def finished(stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run as if it had died in its last step: resumed by its name alone from the checkpoint before, and
    finished."""
    run = Path(shutil.copytree(stopped, tmp_path_factory.mktemp("resumed") / "small"))
    *_, newest = sorted((run / "checkpoints").iterdir())
    (newest / "learner/rank-0001.safetensors").unlink()
    process = launch(run.parent, f"algorithm.steps={len(steps(run))}", "run.resume=small")
    try:
        out, err = process.communicate(timeout=START_S)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert f"changed: algorithm.steps={len(steps(run))}, was 1000\n" in out and "learner.schedule" not in out
    assert "rank-0001.safetensors" in out and "the checkpoint before it is taken" in out
    assert re.search(r"\nreading .*/step-\d+\n", out) and "\nexporting the policy\n" in out
    return run


def rows(run: Path) -> list[dict[str, float]]:
    """Metrics by step, without what a clock or the machine measured."""
    measured = ("time/", "throughput/", "learner/")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(measured)} for line in lines]


def test_a_resumed_run_equals_one_that_was_never_stopped(stopped: Path, finished: Path) -> None:
    """Bit for bit: model, optimizer, data order, sampling, rank store and versions all go on."""
    assert [row["policy/version"] for row in rows(finished)] == list(range(len(steps(stopped))))
    assert rows(finished) == rows(stopped)
    last, again = ((run / "metrics.jsonl").read_text().splitlines()[-1] for run in (stopped, finished))
    assert last != again  # in what a clock measured: the step was done again


def test_a_finished_run_leaves_what_was_promised(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert {"before", "after", "steps", "seconds", "restarts", "seed"} <= summary.keys()
    assert {HELD_OUT.name, HELD_OUT._replace(way=GREEDY).name} <= summary["before"].keys() & summary["after"].keys()
    assert 0 < summary["after"][HeldOut("segment", catalog.PARSED).name] <= 1
    assert summary["steps"] == steps(finished)[-1]
    page = (finished / "report.html").read_text()
    assert "<svg" in page and "data:image/" in page and "http://" not in page.replace("http://www.w3.org", "")
    rollouts = pq.read_table(sorted((finished / "rollouts").glob("train-*.parquet"))[-1]).to_pylist()
    assert len(rollouts) == 16 and {"reward", "question", "text"} <= rollouts[0].keys()


def test_the_exported_policy_has_moved_and_loads_in_transformers(finished: Path) -> None:
    before = AutoModelForImageTextToText.from_pretrained(ROOT / "assets/policy")
    after = AutoModelForImageTextToText.from_pretrained(finished / "policy")
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert np.mean(moved) > 0.9
    assert len(AutoTokenizer.from_pretrained(finished / "policy")) == len(
        AutoTokenizer.from_pretrained(ROOT / "assets/policy")
    )
