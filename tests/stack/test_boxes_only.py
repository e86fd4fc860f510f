"""Counting and grounding from boxes alone, in one mixed set, rollouts one step ahead and with README's plugin; one of
the images that are not decoded at the start is cut off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from perception.config import DataConfig
from perception.datasets import load
from runtime.cluster import ROOT
from synthetic import world
from tests.plugin_run import readme_plugin

QUESTIONS, DAMAGED = 36, 35
"""Of the training questions the one whose image is cut off; step 2 asks it."""


def write_lines(folder: Path, split: str, tasks: dict[str, int]) -> Path:
    """Questions of the synthetic world as README's JSONL, with boxes alone: so many of each task."""
    source = str(folder / "world" / f"{split}.json")
    samples = [s for s in load(DataConfig(format="coco", train=source, eval=source), source) if s.target.count]
    lines = [
        {
            "image": str(Path(sample.image.path).relative_to(folder)),
            "question": sample.question,
            "task": task,
            "boxes": sample.target.boxes.tolist(),
        }
        for task, count in tasks.items()
        for sample in [samples.pop() for _ in range(count)]
    ]
    file = folder / f"{split}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("boxes")
    world.write(folder / "world", train=64, eval=16)
    train, held_out = (
        write_lines(folder, split, {"count": n, "ground": 3}) for split, n in (("train", QUESTIONS - 3), ("eval", 2))
    )
    damaged = folder / json.loads(train.read_text().splitlines()[DAMAGED])["image"]
    damaged.write_bytes(damaged.read_bytes()[:500])
    plugin, _ = readme_plugin(folder)
    command = [
        *(sys.executable, "-m", "launch.train", "recipe=quickstart", "data=jsonl", "data.world_side=null"),
        *(f"data.train={train}", f"data.eval={held_out}", "task.ground=${task.segment}"),
        *("reward=vision_reasoner", "+reward.components.count_exact=1.0", "pipeline.max_staleness=1"),
        *(f"plugins=[{plugin}]", "+reward.components.edge_error={weight: 0.5, reach: 64}"),
        *("algorithm.steps=3", "algorithm.prompts_per_step=4", "algorithm.group_size=4"),
        *(f"run.output={folder}/runs", "run.name=boxes"),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "boxes"


def test_each_task_is_evaluated_by_its_own_metrics(run: Path) -> None:
    before, after = map(json.loads, (run / "evaluations.jsonl").read_text().splitlines())
    measures = {"count": ("count_exact", "count_ratio"), "ground": ("box_accuracy", "box_iou")}
    ways = ("greedy", "interval", "sampled")
    names = {f"{task}/{one}/{way}" for task in measures for one in measures[task] for way in ways}
    names |= {f"{task}/{one}/sampled" for task in measures for one in ("parsed", "samples")}
    for evaluation in (before, after):
        assert evaluation.keys() == {"step"} | names
        assert evaluation["count/samples/sampled"] == 2 and evaluation["ground/samples/sampled"] == 3
        # Two counting questions, four answers to each.
        assert (evaluation["count/count_exact/sampled"] * 8).is_integer()


def test_the_step_learns_from_rollouts_of_the_step_before(run: Path) -> None:
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2, 3]
    for row in metrics:
        assert 0 <= row["component/count_exact"] <= 1 and 0 <= row["component/edge_error"] <= 1
        assert row["policy/optimizer_steps"] == 1
        versions = {
            version
            for rollout in pq.read_table(run / f"rollouts/train-{row['step']:06d}.parquet").to_pylist()
            for version in rollout["policy_versions"]
        }
        # Weights of version s were made by step s. Step t is sampled while step t-1 learns, or after it.
        assert versions and versions <= {row["step"] - 2, row["step"] - 1}


def test_no_mask_was_asked_of_the_data(run: Path) -> None:
    rows = pq.read_table(run / "rollouts/train-000003.parquet").to_pylist()
    assert rows and {row["task"] for row in rows} <= {"count", "ground"}
    for row in rows:
        assert row["truth_masks"] == [] and row["truth_boxes"] and not {"mask_iou"} & dict(row["metrics"]).keys()


def test_a_damaged_image_costs_its_own_answers_and_nothing_else(run: Path) -> None:
    """It fails in the engine, is left alone by reward worker and learner, and is recorded with its name."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(row["failure/engine"] for row in metrics) == [0.0, 0.0, 0.25]
    rows = [row for step in (1, 2, 3) for row in pq.read_table(run / f"rollouts/train-{step:06d}.parquet").to_pylist()]
    failed = [row for row in rows if row["failure"] == "engine"]
    assert len(failed) == 4 and {row["sample_id"] for row in failed} == {f"train:{DAMAGED + 1}"}
    assert all("the image is damaged" in row["failure_detail"] for row in failed)
    assert f"train:{DAMAGED + 1}" in (run / "report.html").read_text()
