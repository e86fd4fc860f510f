"""Guards the plan of `benchmarks/gpu_hour.sh`: it fits into 40 minutes, and every command line is one that its program
takes. No GPU is needed to read it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn
from unittest import mock

import pytest

from benchmarks import gpu_hour
from benchmarks.gpu_hour import PLAN, Step
from launch.run import checks, prompts
from launch.run.config import compose
from runtime import cluster, placement
from tests.gpu.test_engine_on_gpu import FIXED, WHOLE_RUNS

BENCHMARKS = [step for step in PLAN if step.words[1:2] == ["-m"] and step.words[2].startswith("benchmarks.")]


class Reached(Exception):
    """What comes after the command line has been read."""


def reached(*arguments: Any, **named: Any) -> NoReturn:
    raise Reached(*arguments)


def test_the_plan_fits_into_forty_minutes_and_its_names_differ() -> None:
    assert sum(step.limit_s + gpu_hour.GRACE_S for step in PLAN) <= 40 * 60
    assert len({step.name for step in PLAN}) == len(PLAN)


def test_the_gpu_tests_take_eight_minutes_at_most() -> None:
    assert [step.words[-2:] for step in PLAN[:2]] == [["-m", "launch.doctor"], ["test-gpu", "CUDA=1"]]
    makefile = (cluster.ROOT / "Makefile").read_text()
    limits = re.search(r"^test-gpu:.*\n.*--timeout=(\d+) --session-timeout=(\d+)", makefile, re.M)
    assert limits is not None
    tests = "".join(file.read_text() for file in (cluster.ROOT / "tests/gpu").glob("test_*.py"))
    own = [int(seconds) for seconds in re.findall(r"mark\.timeout\((\d+)\)", tests)]
    assert max(int(limits[1]), *own) + int(limits[2]) <= 8 * 60 < PLAN[1].limit_s


@pytest.mark.parametrize("step", BENCHMARKS, ids=lambda step: step.name)
def test_every_benchmark_takes_its_command_line(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    program: Any = import_module(step.words[2])
    monkeypatch.setattr("sys.argv", step.words[2:])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(prompts, "read_policy_spec", reached)
    monkeypatch.setattr(cluster, "connect", reached)
    for name, stand_in in {"find_spec": bool, "prepare": lambda *_, **__: None, "compare": reached}.items():
        monkeypatch.setattr(program, name, stand_in, raising=False)
    if step.words[2] == "benchmarks.step":
        monkeypatch.setattr(program, "measure", reached)
    with mock.patch.dict(os.environ), pytest.raises(Reached) as found:
        program.main()
    assert "--json" in step.words
    if step.words[2] == "benchmarks.rollout":
        assert found.value.args[0].path.endswith(compose(["recipe=shape_3b"]).model.path)
    if step.words[2] == "benchmarks.step":
        recipe, steps, overrides = found.value.args
        compose([f"recipe={recipe}", *overrides])
        assert steps > program.WARM_UP


@pytest.mark.parametrize("overrides", WHOLE_RUNS.values(), ids=WHOLE_RUNS)
def test_whole_runs_among_the_gpu_tests_fit_one_gpu(overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(placement, "local_gpus", lambda: 1)
    monkeypatch.setattr(placement, "cpus", lambda: 8)
    config = compose([*FIXED, *overrides])
    checks.check_settings(config)
    placement.check_resources(config)
    assert config.placement.device == "cuda" and config.model.dtype == "bfloat16"
