"""Trackers: what they are told can be read back; one that fails, or is slow, costs a run nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.record import trackers
from launch.record.recorder import Recorder
from launch.record.trackers import TRACKERS, Tracked, Tracker, check_trackers
from launch.record.trackers.wandb import _run_id
from perception import metric_catalog as catalog
from perception.errors import UserError
from tests.builders import changed
from tests.fake_run import config


def test_tensorboard_is_read_back_and_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    settings = changed(config(tmp_path), "run", trackers=("tensorboard",))
    with Recorder(settings) as recorder:
        recorder.evaluation(0, {"segment/mask_iou/greedy": 0.25})
        for step in (1, 2, 3):
            recorder.step(step, {catalog.REWARD_MEAN: step / 4}, [])
    with Recorder(changed(settings, "run", resume="quickstart"), resume_step=2) as recorder:
        recorder.step(3, {catalog.REWARD_MEAN: 8.0}, [])
        recorder.alert("nothing parses", "step 3: what was written")
    found = EventAccumulator(str(recorder.run_dir / "tensorboard")).Reload()
    scalars = {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert scalars == {
        "eval/segment/mask_iou/greedy": [(0, 0.25)],
        catalog.REWARD_MEAN: [(1, 0.25), (2, 0.5), (3, 8.0)],
    }
    texts = {tag: found.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    assert texts["alerts/nothing parses/text_summary"] == "step 3: what was written"
    assert "group_size: 8" in texts["settings/text_summary"]


class Listening(Tracker):
    package = "json"
    heard: ClassVar[list[tuple[int, Mapping[str, float | None]]]] = []
    fails_at, slow_at = -1, -1

    def __init__(self, run: Tracked) -> None:
        self.name = run.run_dir.name

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        if step == self.fails_at:
            raise ConnectionError("no route to host")
        if step == self.slow_at:
            time.sleep(5)
        self.heard.append((step, metrics))

    def close(self) -> None:
        self.heard.append((-1, {}))


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> type[Listening]:
    monkeypatch.setitem(TRACKERS._entries, "listening", Listening)
    monkeypatch.setattr(Listening, "heard", [])
    return Listening


def run(output: Path, *steps: int) -> None:
    with Recorder(changed(config(output), "run", trackers=("listening",))) as recorder:
        for step in steps:
            recorder.step(step, {"a": float(step)}, [])


def test_a_tracker_of_ones_own_hears_everything_in_order(tmp_path: Path, listening: type[Listening]) -> None:
    run(tmp_path, 1, 2)
    assert listening.heard == [(1, {"a": 1.0}), (2, {"a": 2.0}), (-1, {})]


def test_one_that_fails_is_a_warning(
    tmp_path: Path, listening: type[Listening], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "fails_at", 2)
    with caplog.at_level(logging.WARNING):
        run(tmp_path, 1, 2, 3)
    assert [step for step, _ in listening.heard] == [1]
    assert "listening stopped, the run goes on without it: no route to host" in caplog.text


def test_one_that_is_slow_is_given_up_at_the_end(
    tmp_path: Path, listening: type[Listening], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "slow_at", 1)
    monkeypatch.setattr(trackers, "CLOSE_TIMEOUT_S", 0.1)
    began = time.monotonic()
    run(tmp_path, 1, 2)
    assert time.monotonic() - began < 4
    assert "listening did not finish within" in caplog.text


def test_what_is_unknown_or_not_installed_is_refused(
    listening: type[Listening], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_trackers(("wandb", "tensorboard", "listening"))
    with pytest.raises(UserError, match="no tracker 'tensorbord'; did you mean 'tensorboard'"):
        check_trackers(("tensorbord",))
    monkeypatch.setattr(listening, "package", "not_installed")
    with pytest.raises(UserError, match=r"run\.trackers: listening needs not_installed.*pip install"):
        check_trackers(("listening",))


def test_a_run_of_a_wandb_sweep_is_the_one_that_its_agent_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc12345")
    assert _run_id(tmp_path) == "abc12345"
    monkeypatch.delenv("WANDB_RUN_ID")
    assert _run_id(tmp_path) == "abc12345"  # resumed
