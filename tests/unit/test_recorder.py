"""Guards what a run leaves on disk: nothing lost, nothing half written, nothing written by two; resume is exact."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from launch.record import rollouts, run_directory
from launch.record.recorder import Recorder
from launch.record.trackers.wandb import logged_in, resolved_mode
from perception import metric_catalog as catalog
from perception.config import Config, RunConfig, WandbConfig
from perception.errors import UserError
from perception.metric_catalog import GREEDY, HeldOut
from perception.types import FailureKind, ImageSource
from tests import builders
from tests.builders import changed, noise
from tests.fake_run import LOOK, N, config, scene_group, write_run


def steps_in(run_dir: Path) -> list[int]:
    return [record["step"] for record in run_directory.read_lines(run_dir / run_directory.METRICS)]


def record(recorder: Recorder, *steps: int) -> None:
    for step in steps:
        recorder.step(step, {catalog.REWARD_MEAN: 0.1 * step}, [])


def test_files_of_a_run(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=20)
    assert steps_in(run_dir) == list(range(1, 21))
    metrics = run_directory.read_lines(run_dir / run_directory.METRICS)
    assert metrics[6][catalog.ENTROPY] is None, "NaN is not JSON: it must be null"
    assert [e["step"] for e in run_directory.read_lines(run_dir / run_directory.EVALUATIONS)] == [0, 20]
    assert (
        json.loads((run_dir / run_directory.SUMMARY).read_text())["before"][HeldOut("segment", "mask_iou", GREEDY).name]
        == 0.561
    )
    assert len(list((run_dir / run_directory.ROLLOUTS).glob("train-*.parquet"))) == 20
    assert not [path for path in run_dir.rglob(".*") if path.name != run_directory.LOCK], "scratch files left behind"


def test_rollouts_round_trip(tmp_path: Path) -> None:
    groups = [scene_group(tmp_path, seed, 5.0, np.random.default_rng(seed)) for seed in range(3)]
    groups = [builders.with_advantages(one, [float(i) for i in range(N)]) for one in groups]
    path = tmp_path / "train-000001.parquet"
    rollouts.write(path, 1, groups)
    rows = rollouts.read(path)
    assert len(rows) == 3 * N
    for row, (about, one) in zip(rows, ((each, one) for each in groups for one in each.trajectories), strict=True):
        score, asked = one.score, about.prompt.sample
        assert score is not None
        assert row["text"] == one.text and row["turns"] == [one.text]
        assert row["reward"] == one.reward and row["advantage"] == float(one.index)
        assert row["metrics"] == dict(score.metrics)
        assert row["boxes"] == [pytest.approx(answered.box) for answered in score.best.answer.objects]
        assert row["failure"] == (one.failure.kind if one.failure else None)
        assert row["image"] == asked.image.path
        assert row["picture"].read_bytes() == Path(asked.image.path).read_bytes(), "small pictures are kept as they are"
        assert row["truth_masks"] == [mask.counts.decode() for mask in asked.target.masks]


def test_what_was_not_measured_has_neither_reward_nor_advantage(tmp_path: Path) -> None:
    about = scene_group(tmp_path, 5, 5.0, np.random.default_rng(0))
    lost = replace(about.trajectories[1], score=None, reward=None, failure=builders.failure(FailureKind.SCORER, "late"))
    path = tmp_path / "train-000001.parquet"
    rollouts.write(path, 1, [replace(about, trajectories=(about.trajectories[0], lost))])
    measured, missing = rollouts.read(path)
    assert measured["reward"] is not None and measured["advantage"] == 0.0
    assert (missing["reward"], missing["advantage"], missing["metrics"]) == (None, None, {})
    assert (missing["failure"], missing["failure_detail"]) == ("scorer", "late") and missing["text"] == lost.text


def test_every_pass_is_kept_and_the_columns_describe_the_most_confident_one(tmp_path: Path) -> None:
    about = scene_group(tmp_path, 12, 13.0, np.random.default_rng(0), LOOK)
    path = tmp_path / "train-000001.parquet"
    rollouts.write(path, 1, [about])
    for row, trajectory in zip(rollouts.read(path), about.trajectories, strict=True):
        score = trajectory.score
        assert score is not None
        assert [one["text"] for one in row["passes"]] == row["turns"] == [turn.text for turn in trajectory.turns]
        for one, turn, candidate in zip(row["passes"], trajectory.turns, score.candidates, strict=True):
            view = turn.view
            assert one["view"] == ([view.left, view.top, view.right, view.bottom] if view else None)
            assert (one["confidence"], one["mask_iou"]) == (candidate.confidence, candidate.mask_iou)
            assert one["boxes"] == [pytest.approx(answered.box) for answered in candidate.answer.objects]
            assert one["points"] == [pytest.approx(answered.point) for answered in candidate.answer.objects]
            assert one["mask"] == (candidate.mask.counts.decode() if candidate.mask else None)
        assert [i for i, one in enumerate(row["passes"]) if one["kept"]] == [score.kept]
        described = ("text", "confidence", "boxes", "points", "mask")
        assert [row["passes"][score.kept][name] for name in described] == [row[name] for name in described]
    assert {one.score.kept for one in about.trajectories if one.score} == {0, 1}, "the scene was chosen to have both"


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_picture_is_stored_once_per_run_and_no_larger_than_a_report_shows_it(tmp_path: Path, kind: str) -> None:
    about = scene_group(tmp_path, 5, 5.0, np.random.default_rng(0))
    large = np.kron(noise(0, 30, 40), np.ones((100, 100, 1), np.uint8))
    file = tmp_path / f"large.{kind}"
    cv2.imwrite(str(file), large)
    sample = replace(about.prompt.sample, image=ImageSource(path=str(file)), height=3000, width=4000)
    shown = replace(about, prompt=replace(about.prompt, sample=sample))
    with Recorder(config(tmp_path)) as recorder:
        for step in range(1, 4):
            recorder.step(step, {}, [shown, shown])
    folder = recorder.run_dir / run_directory.ROLLOUTS
    (stored,) = (folder / "pictures").iterdir()
    for table in folder.glob("*.parquet"):
        assert {row["picture"] for row in rollouts.read(table)} == {stored}
        assert table.stat().st_size < 50_000
    small = cv2.imread(str(stored))
    assert small.shape == (768, 1024, 3)
    assert stored.stat().st_size < file.stat().st_size
    assert np.abs(small[::26, ::26].astype(int) - cv2.resize(large, (1024, 768))[::26, ::26]).mean() < 12


def test_rollouts_are_recorded_every_so_many_steps(tmp_path: Path) -> None:
    about = scene_group(tmp_path, 5, 5.0, np.random.default_rng(0))
    with Recorder(changed(config(tmp_path), "run", rollouts_every=3)) as recorder:
        for step in range(1, 8):
            recorder.step(step, {}, [about])
        recorder.evaluation(7, {}, [about])
    names = sorted(path.stem for path in (recorder.run_dir / run_directory.ROLLOUTS).glob("*.parquet"))
    assert names == ["eval-000007", "train-000003", "train-000006"]


def test_only_the_kept_groups_are_written(tmp_path: Path) -> None:
    groups = [scene_group(tmp_path, seed, 5.0, np.random.default_rng(seed)) for seed in range(6)]
    with Recorder(config(tmp_path)) as recorder:  # keeps 4
        recorder.step(1, {}, groups)
    rows = rollouts.read(recorder.run_dir / run_directory.ROLLOUTS / "train-000001.parquet")
    assert [row["sample_id"] for row in rows[::N]] == [f"scene-{seed}" for seed in range(4)]


def test_an_older_run_is_moved_aside_whole(tmp_path: Path) -> None:
    for mark in range(3):
        with Recorder(config(tmp_path)) as recorder:
            record(recorder, *range(1, mark + 2))
    assert steps_in(tmp_path / "quickstart") == [1, 2, 3]
    assert steps_in(tmp_path / "quickstart.1") == [1]
    assert steps_in(tmp_path / "quickstart.2") == [1, 2]


def test_a_run_that_recorded_nothing_leaves_no_trace(tmp_path: Path) -> None:
    for _ in range(2):
        Recorder(config(tmp_path)).close()
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart"]


def test_what_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="not a run"):
        Recorder(config(tmp_path))
    assert (tmp_path / "quickstart" / "thesis.tex").is_file()


def resumed(output: Path, steps: int = 60) -> Config:
    return changed(config(output, steps=steps), "run", resume="quickstart")


def test_two_runs_never_share_a_directory(tmp_path: Path) -> None:
    with Recorder(config(tmp_path)) as recorder:
        record(recorder, 1)
        with pytest.raises(UserError, match="being written by another run"):
            Recorder(config(tmp_path))
        with pytest.raises(UserError, match="being written by another run"):
            Recorder(resumed(tmp_path), resume_step=1)
        record(recorder, 2)
    assert steps_in(tmp_path / "quickstart") == [1, 2]


def test_resume_records_again_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=20)
    with (run_dir / run_directory.METRICS).open("a") as file:
        file.write('{"step": 21, "rew')  # killed while writing
    with Recorder(resumed(tmp_path, steps=30), resume_step=12) as recorder:
        assert recorder.run_dir == run_dir
        assert steps_in(run_dir) == list(range(1, 13))
        record(recorder, 13, 14)
    assert steps_in(run_dir) == list(range(1, 15))
    assert [e["step"] for e in run_directory.read_lines(run_dir / run_directory.EVALUATIONS)] == [0]
    kept = {path.name for path in (run_dir / run_directory.ROLLOUTS).iterdir()}
    assert "train-000012.parquet" in kept and "train-000013.parquet" not in kept and "eval-000020.parquet" not in kept
    assert "steps: 20" in (run_dir / "config.until-000012.yaml").read_text()
    assert "steps: 30" in (run_dir / run_directory.CONFIG).read_text()


def test_a_run_to_resume_must_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run there"):
        run_directory.find(RunConfig(name="x", output=str(tmp_path), resume="absent"))


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / run_directory.METRICS
    path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        run_directory.read_lines(path)


def test_output_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.output"):
        run_directory.create(tmp_path / "file" / "x")


def test_wandb_is_offline_unless_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not logged_in() and resolved_mode(WandbConfig()) == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert logged_in() and resolved_mode(WandbConfig()) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolved_mode(WandbConfig()) == "disabled"
    assert resolved_mode(WandbConfig(mode="offline")) == "offline"


def test_every_metric_name_is_spelled_once() -> None:
    values = [value for name, value in vars(catalog).items() if name.isupper() and isinstance(value, str)]
    assert len(values) == len(set(values))
