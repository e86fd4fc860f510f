"""Guards docs/gpu.md: what it names exists, and no GPU test and no step of the GPU hour is left out."""

from __future__ import annotations

import re

import pytest

from benchmarks.gpu_hour import PLAN
from runtime.cluster import ROOT

TABLE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`((?:unit|stack|gpu)/test_\w+\.py)::(test_\w+)`", TABLE))
STEPS = {name for cell in re.findall(r"\bsteps? (`[^|]*`)", TABLE) for name in re.findall(r"`([^`]+)`", cell)}


def functions_of(file: str) -> set[str]:
    return set(re.findall(r"^(?:async )?def (test_\w+)", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.M))


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_every_test_that_is_named_exists(file: str) -> None:
    assert {test for name, test in NAMED if name == file} <= functions_of(file)


def test_every_reference_is_a_test_of_a_file() -> None:
    assert TABLE.count("::") == len(re.findall(r"`(?:unit|stack|gpu)/test_\w+\.py::test_\w+`", TABLE)) > 30


def test_no_gpu_test_is_left_out() -> None:
    files = [f"gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("test_*.py")]
    assert {(file, test) for file in files for test in functions_of(file)} == {one for one in NAMED if one[0] in files}


def test_every_step_of_the_gpu_hour_is_named_and_no_other() -> None:
    assert {step.name for step in PLAN} == STEPS
