"""Guards what a person sees while a run goes: plain lines in a log, a live panel on a terminal; a NaN is no crash."""

from __future__ import annotations

import io
import math
import time

from rich.console import Console

from launch.record.progress import Progress
from perception import metric_catalog as catalog

STEP = {
    catalog.REWARD_MEAN: 0.5,
    catalog.PARSE_OK: 0.75,
    catalog.TOKENS_PER_S: 1234.0,
    catalog.SECONDS_STEP: 6.0,
    catalog.SECONDS_GENERATE: 2.0,
    catalog.SECONDS_LEARN: 3.5,
}


def shown(*, terminal: bool, **changes: float) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    with Progress(12, console=console) as progress:
        progress.phase("starting the engine [1]")
        for step in (1, 2):
            progress.step(step, STEP | changes)
    return out.getvalue()


def test_one_plain_line_per_step_in_a_log() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines[0] == "starting the engine [1]"
    assert lines[2] == (
        "step 2/12  reward 0.500  parsed 75.0%  1,234 tok/s  6.0 s/step  [generate 2.00  learn 3.50]  ETA 1:00"
    )
    assert len(lines) == 3


def test_a_live_panel_on_a_terminal() -> None:
    text = shown(terminal=True)
    assert "step 2/12" in text and "ETA 1:00" in text and "generate 2.00 s" in text


def test_nan_is_shown_not_raised() -> None:
    assert "step 2/12" in shown(terminal=True, **{catalog.REWARD_MEAN: math.nan})


def test_what_lasts_is_told_with_its_time_in_a_log() -> None:
    out = io.StringIO()
    with Progress(console=Console(file=out, width=120), remind_s=0.05) as progress:
        progress.phase("reading and checking the data")
        time.sleep(0.35)
        progress.step(1, STEP)
        before = len(out.getvalue().splitlines())
        time.sleep(0.2)  # nothing is going on
        after = len(out.getvalue().splitlines())
    lines = out.getvalue().splitlines()
    assert lines[0] == "reading and checking the data" and lines[1] == "reading and checking the data … 0:00"
    assert before == after >= 3


def test_what_is_quick_is_told_once_and_a_step_not_at_all() -> None:
    out = io.StringIO()
    with Progress(console=Console(file=out, width=120), remind_s=5.0) as progress:
        progress.phase("starting Ray")
        progress.phase("step 1", announce=False)
    assert out.getvalue() == "starting Ray\n"


def test_a_terminal_shows_what_goes_on_and_since_when() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    with Progress(console=console) as progress:
        progress.phase("starting Ray")
    assert "starting Ray … 0:00" in out.getvalue() and "step 0/0" not in out.getvalue()
