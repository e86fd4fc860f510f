"""The arithmetic of `benchmarks.step`: what a step's figures become, and when two sides are compared."""

from dataclasses import replace
from typing import Any

import pytest

from benchmarks import step
from launch.run.config import compose
from perception.config import Config


def taken(seconds: float, generate: float, tokens: float, cpu_s: float = 1.0) -> dict[str, float]:
    parts = {"generate": generate, "score": 0.25, "learn": 0.5, "sync": 0.0}
    return {"step": seconds, **parts, "tokens": tokens, "cpu_s": cpu_s}


def test_figures_are_medians_and_the_controller_has_what_remains() -> None:
    steps = [taken(2.0, 1.0, 40, cpu_s=3.0), taken(9.0, 8.0, 80, cpu_s=2.0), taken(4.0, 3.0, 60, cpu_s=7.0)]
    found = step.summary(steps, answers=4)
    assert found["seconds"] == {"generate": 3.0, "score": 0.25, "learn": 0.5, "sync": 0.0, "controller": 0.25}
    assert (found["step_s"], found["cpu_s"], found["samples_per_s"]) == (4.0, 3.0, 1.0)
    assert found["tokens"] == 15.0  # 180 tokens in 3 steps of 4 answers
    assert found["tokens_per_s"] == 15.0  # of 20, 8.9 and 15


def test_the_ratio_is_of_whole_steps_and_every_part_says_what_it_saves() -> None:
    ours, rival = (step.summary([taken(*one)], answers=4) for one in ((2.0, 1.0, 40), (5.0, 3.5, 42)))
    found = step.compared(ours, rival)
    assert found["ratio"] == 2.5
    assert found["saved_s"] == {"generate": 2.5, "score": 0.0, "learn": 0.0, "sync": 0.0, "controller": 0.5}
    assert sum(found["saved_s"].values()) == rival["step_s"] - ours["step_s"]


@pytest.mark.parametrize("tokens", [35, 45])
def test_answers_of_other_lengths_are_not_the_same_work(tokens: float) -> None:
    ours, rival = (step.summary([taken(2.0, 1.0, many)], answers=4) for many in (40, tokens))
    with pytest.raises(RuntimeError, match=rf"ours of 10\.0 tokens, TRL's of {tokens / 4:.1f}"):
        step.compared(ours, rival)


@pytest.fixture(scope="module")
def quickstart() -> Config:
    return compose(["recipe=quickstart"])


@pytest.mark.parametrize("rows", [8, 128, 256])
def test_a_run_that_trl_can_do_is_taken(quickstart: Config, rows: int) -> None:
    step.check(quickstart, rows)


@pytest.mark.parametrize(
    ("rows", "part", "change", "message"),
    [
        (96, "algorithm", {"group_size": 8}, "must divide a step's 256 answers"),
        (32, "algorithm", {"prompts_per_step": 4, "group_size": 3}, "must divide a step's 12 answers"),
        (128, "look", {"mode": "relook"}, "second looks"),
        (128, "reward", {"rank": "ecdf"}, "ranks against earlier steps"),
        (128, "pipeline", {"max_staleness": 1}, "rollouts ahead"),
    ],
)
def test_a_run_that_trl_cannot_do_is_refused(
    quickstart: Config, rows: int, part: str, change: dict[str, Any], message: str
) -> None:
    changed = replace(quickstart, **{part: replace(getattr(quickstart, part), **change)})
    with pytest.raises(SystemExit, match=message):
        step.check(changed, rows)
