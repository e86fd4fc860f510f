"""Guards `benchmarks/gpu_hour.sh`: a step that fails, hangs or is not there is recorded, and the next one taken."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from benchmarks.gpu_hour import PLAN, Step, run
from runtime.cluster import ROOT


def test_what_goes_wrong_in_a_step_is_recorded_and_the_next_one_taken(tmp_path: Path) -> None:
    plan = [
        Step(
            "good", 20, """python -c 'import json; print("a word"); print(json.dumps(dict(ratio=2.5))); print("{")'"""
        ),
        Step("bad", 20, """python -c 'import sys; print("{}"); sys.exit("no such card")'"""),
        Step("slow", 1, "sh -c 'echo at it; sleep 30 & wait'"),
        Step("absent", 20, "no-such-program"),
    ]
    taken = run(plan, tmp_path / "gpu.json")
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["environment"]["gpus"] == []
    assert [(one["name"], one["results"]) for one in kept["steps"]] == [
        ("good", [{"ratio": 2.5}]),
        ("bad", [{}]),
        ("slow", []),
        ("absent", []),
    ]
    good, bad, slow, absent = (one["error"] for one in kept["steps"])
    assert good is None
    assert bad.startswith("exit 1: ") and bad.endswith("no such card")
    assert slow == "over 1 s: at it"
    assert absent.startswith("exit 127: ")
    assert taken[2].seconds < 10
    assert "ratio 2.5" in str(taken[0]) and "no such card" in str(taken[1])


def test_the_script_prints_its_plan(tmp_path: Path) -> None:
    command = [ROOT / "benchmarks" / "gpu_hour.sh", "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(PLAN)
    for line, step in zip(lines, PLAN, strict=True):
        assert line.split()[0] == str(step.limit_s)
        assert step.name in line and step.words[-1] in line
