"""A sweep's combinations as real processes: bounded, told apart, told to end; and one sweep that really trains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from hydra_plugins.relook_launcher import side_by_side
from launch.record import run_directory
from perception.errors import UserError
from report.sweep import read_sweep
from runtime.cluster import ROOT
from tests.unit.test_sweeps import GIOU

PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv[1:])
run, lr = Path(words["run.output"].strip('"')) / words["run.name"], float(words["learner.lr"])
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
(run.parent / f"{run.name}.lives").touch()
print("alive:", len(list(run.parent.glob("*.lives"))), os.environ["WANDB_RUN_GROUP"], flush=True)
deadline = time.monotonic() + (0.3 if lr < 1 else 30)
while time.monotonic() < deadline and len(told) < lr:
    time.sleep(0.01)
(run.parent / f"{run.name}.lives").unlink()
if lr < 0:
    sys.exit("fine\\nerror: learner.lr: it is negative\\nbye")
if lr < 1:
    (run / "evaluations.jsonl").write_text(json.dumps({"step": 1, "GIOU": lr}) + "\\n")
    (run / "summary.json").write_text("{}")
""".replace("GIOU", GIOU)


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> side_by_side.SideBySide:
    """A launcher of a program that fails below 0, is done at once below 1, and else waits for so many signals."""
    Plugins.instance()  # Hydra executes its plugins' modules anew when it first looks for them
    monkeypatch.setattr(side_by_side, "PROGRAM", (sys.executable, "-c", PROGRAM))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    return launcher(tmp_path / "my runs" / "x-sweep")


def launcher(folder: Path, at_once: int = 2) -> side_by_side.SideBySide:
    made = side_by_side.SideBySide(at_once)
    task = ["recipe=quickstart", "learner.lr=1,2"]
    hydra = {"overrides": {"task": task}, "runtime": {"config_sources": []}, "sweep": {"dir": str(folder)}}
    made.setup(config=OmegaConf.create({"hydra": hydra}))
    return made


def words(*rates: float) -> list[list[str]]:
    return [["recipe=quickstart", f"learner.lr={lr}"] for lr in rates]


def test_a_failure_is_a_line_and_the_sweep_goes_on(
    sweep: side_by_side.SideBySide, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = sweep.launch(words(0.1, -1, 0.3, 0.4), 0)
    assert [job.return_value for job in jobs] == [0.1, None, 0.3, 0.4]
    combinations = {one.run_dir.name: one for one in read_sweep(sweep.folder)}
    assert list(combinations) == ["lr-0.1", "lr--1", "lr-0.3", "lr-0.4"]
    assert combinations["lr--1"].failed == "exit status 1: error: learner.lr: it is negative"
    assert all(one.failed == "" for name, one in combinations.items() if name != "lr--1")
    outputs = [(one.run_dir / run_directory.OUTPUT).read_text().split("\n")[0] for one in combinations.values()]
    assert all(re_alive in ("alive: 1 x-sweep", "alive: 2 x-sweep") for re_alive in outputs)
    said = capsys.readouterr().out.splitlines()
    assert (
        sum("begins" in line for line in said) == 4
        and "lr--1: exit status 1: error: learner.lr: it is negative" in said
    )
    assert [job.return_value for job in sweep.launch(words(0.1), 4)] == [0.1]  # a search asks again for the same
    assert list(read_sweep(sweep.folder))[-1].run_dir.name == "lr-0.1-2"
    with pytest.raises(SystemExit) as ended:
        side_by_side.conclude(sweep.folder, 2)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: 1 of 5 combinations failed\n"
    assert (sweep.folder / run_directory.REPORT).is_file()


@pytest.mark.parametrize("signals", [1, 2, 3])
def test_a_signal_ends_the_sweep(signals: int, sweep: side_by_side.SideBySide) -> None:
    """The first ends what runs after its step, as far as it does so; a second one is passed on, a third kills."""

    def tell() -> None:
        while len(list(sweep.folder.glob("*.lives"))) < 2:
            time.sleep(0.01)
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)

    teller = threading.Thread(target=tell)
    teller.start()
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        sweep.launch(words(signals, 5 if signals == 3 else signals, 0.5), 0)
    teller.join()
    assert ended.value.code == 130 and time.monotonic() - began < 15
    first, second, third = (one.failed or "" for one in read_sweep(sweep.folder))
    assert first.startswith("stopped before its last step; go on with run.resume=") or signals == 3
    assert second.startswith("exit status -9" if signals == 3 else "stopped before")
    assert third == "not begun: the sweep was stopped"


def test_an_older_sweep_is_moved_aside_but_not_one_that_runs(sweep: side_by_side.SideBySide) -> None:
    sweep.launch(words(0.1), 0)
    with pytest.raises(UserError, match="is being written"):
        launcher(sweep.folder)
    sweep.lock.close()
    again = launcher(sweep.folder)
    assert not (again.folder / run_directory.SWEEP).exists()
    assert (sweep.folder.with_name("x-sweep.1") / run_directory.SWEEP).is_file()


def test_a_sweep_trains_what_it_can(tmp_path: Path) -> None:
    small = (
        "recipe=quickstart algorithm.steps=1 algorithm.prompts_per_step=2 algorithm.group_size=2 data.eval_samples=2"
    )
    world = ["data.world_train=128", *(f"data.{split}={tmp_path}/world/{split}.json" for split in ("train", "eval"))]
    swept = ["learner.lr=-1,1e-4", "learner.ranks=1", "look=none", f"run.output={tmp_path}", *world]
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", "--multirun", *small.split(), *swept],
        capture_output=True, text=True, timeout=290, check=False, cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
    )  # fmt: skip
    folder = tmp_path / "quickstart-sweep"
    assert done.returncode == 2, done.stderr
    assert done.stderr == "error: 1 of 2 combinations failed\n"
    bad, good = read_sweep(folder)
    assert bad.failed == "exit status 2: error: learner.lr=-1: Input should be greater than 0"
    assert good.failed == ""
    evaluations = [json.loads(line) for line in (good.run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert [one["step"] for one in evaluations] == [0, 1]
    assert done.stdout.splitlines()[-1] == f"report   {folder / 'report.html'}"
    assert good.run_dir.name in (folder / "report.html").read_text()
