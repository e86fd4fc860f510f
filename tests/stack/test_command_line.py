"""The program as a user meets it: a mistake on the command line is one line and status 2, before anything starts."""

from __future__ import annotations

import subprocess
import sys

from runtime.cluster import ROOT


def test_a_mistake_on_the_command_line_exits_2_with_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", "recipe=quickstart", "learner.lrr=1"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert done.stderr == "error: unknown key 'learner.lrr'; did you mean 'learner.lr'?\n"
