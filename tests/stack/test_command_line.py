"""The program as a user meets it: a mistake on the command line is one line and status 2, before anything starts."""

from __future__ import annotations

import subprocess
import sys

import pytest

from runtime.cluster import ROOT


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("recipe=quickstart learner.lrr=1", "error: unknown key 'learner.lrr'; did you mean 'learner.lr'?"),
        (
            "recipe=nope",
            "error: recipe=nope: no such choice; there are dr_seg, dr_seg_3b, dr_seg_3b_lora, quickstart, shape_3b",
        ),
    ],
)
def test_a_mistake_on_the_command_line_exits_2_with_one_line(arguments: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", *arguments.split()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
