"""Alarms and `run.stop_if`: rules are read as written, hold when they say, and speak once with an example."""

from __future__ import annotations

import asyncio
import math
from typing import Any
from unittest.mock import Mock

import pytest

from launch.run.alarms import ALARMS, Rule, example
from launch.run.session import Session
from perception import metric_catalog as catalog
from perception.errors import UserError
from perception.types import FailureKind
from tests import builders
from tests.builders import changed, group, measured, trajectory, turn


def begins(text: str, values: list[float], metric: str = catalog.REWARD_MEAN) -> list[int]:
    """Steps, from 1, at which the rule begins to hold."""
    rule = Rule(text)
    return [step for step, value in enumerate(values, start=1) if rule.begins({metric: value})]


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ("reward/mean < 0.1", [0.2, 0.05, 0.0, 0.1, 0.05], [2, 5]),
        ("reward/mean<.1 for 3", [0.0, 0.0, 0.2, 0.0, 0.0, 0.0, 0.0], [6]),
        ("reward/mean > 5e-1 for 2", [0.6, 0.5, 0.6, 0.7], [4]),
        ("reward/mean > -1", [-2.0, 0.0], [2]),
        ("reward/mean flat for 3", [0.3, 0.3, 0.31, 0.3101, 0.3102, 0.4], [5]),
        ("reward/mean < 1 for 2", [0.0, math.nan, 0.0, 0.0], [4]),
        ("reward/mean flat for 2", [math.nan, math.nan, math.inf, math.inf], []),
    ],
)
def test_a_rule_holds_when_it_says(text: str, values: list[float], expected: list[int]) -> None:
    assert begins(text, values) == expected


def test_a_metric_that_is_not_there_fulfils_nothing() -> None:
    assert begins("component/mask_iou < 1", [0.5], metric="component/parsed") == []
    assert begins("component/mask_iou < 1", [0.5], metric="component/mask_iou") == [1]


@pytest.mark.parametrize(
    "text",
    ["", "reward/mean", "reward/mean = 0", "reward/mean < low", "reward/mean < 1 for 0", "reward/mean < 1 for x"],
)
def test_what_is_no_rule_is_refused_with_one_that_is(text: str) -> None:
    with pytest.raises(UserError, match=r"write a rule as 'reward/mean < 0\.1 for 20'"):
        Rule(text)


def test_a_metric_that_no_run_has_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"run\.stop_if=reward/man < 1: .*did you mean 'reward/mean'"):
        Rule("reward/man < 1")


def test_an_example_is_one_line_of_an_answer_that_failed() -> None:
    about = builders.prompt(builders.sample("street-7"))
    failed = trajectory(turn("the car\nis red" + "!" * 900), failure=builders.failure(FailureKind.TRUNCATED, "no end"))
    line = example([group(measured(), failed, about=about)])
    assert line.startswith(r"sample street-7 answered 'the car\nis red!!!") and line.endswith("(truncated: no end)")
    assert "\n" not in line and len(line) < 400


HEALTHY = {
    catalog.PARSE_OK: 0.9,
    catalog.ZERO_VARIANCE: 0.2,
    catalog.failure(FailureKind.TRUNCATED): 0.1,
}


def heed(steps: list[dict[str, float]], *stop_if: str) -> tuple[Session, list[str], list[str]]:
    """A session that has seen these steps, what it said, and its alerts."""
    said, recorder = [], Mock()
    progress: Any = Mock(say=said.append)
    config = changed(builders.config(), "run", stop_if=stop_if)
    session = Session(config, [], {}, Mock(step=4), Mock(), recorder, progress)
    for step, metrics in enumerate(steps, start=1):
        session._heed(
            step, HEALTHY | {catalog.REWARD_MEAN: step / 10} | metrics, [group(measured())], step == len(steps)
        )
    return session, said, [call.args[0] for call in recorder.alert.call_args_list]


@pytest.mark.parametrize(
    ("metrics", "alarm"),
    [
        ({catalog.PARSE_OK: 0.0}, "no answer parses"),
        ({catalog.ZERO_VARIANCE: 1.0}, "rewards of every group are all equal"),
        ({catalog.failure(FailureKind.TRUNCATED): 0.95}, "nearly all answers end at"),
    ],
)
def test_a_run_that_cannot_learn_says_so_once_with_an_example(metrics: dict[str, float], alarm: str) -> None:
    session, said, alerts = heed([{}, metrics, metrics, metrics])
    assert len(said) == len(alerts) == 1 and alarm in alerts[0]
    assert said[0].startswith(f"alarm: step 2: {alerts[0]}") and "sample" in said[0] and "\n" not in said[0]
    assert not session.stop.is_set()


def test_a_reward_that_does_not_move_is_an_alarm() -> None:
    _, said, _ = heed([{catalog.REWARD_MEAN: 0.3}] * 60)
    assert said and said[0].startswith("alarm: step 50: the reward does not move")


def test_a_healthy_run_says_nothing() -> None:
    session, said, alerts = heed([{}] * 70)
    assert not said and not alerts and session.met is None


def test_a_rule_of_the_users_stops_the_run_but_not_in_its_last_step() -> None:
    low = {catalog.REWARD_MEAN: 0.0}
    session, said, alerts = heed([low, low, {}], "reward/mean < 0.05 for 2")
    assert session.stop.is_set() and session.met is session.rules[-1]
    assert alerts == ["run.stop_if"] and "step 2: run.stop_if (reward/mean < 0.05 for 2)" in said[0]
    session, _, _ = heed([low, low], "reward/mean < 0.05 for 2")
    assert not session.stop.is_set() and session.met is None


def test_every_alarm_is_a_rule() -> None:
    assert {Rule(text).text for text in ALARMS} == set(ALARMS)


# ---------------------------------------------------------------- signals


async def signalled(session: Session, times: int) -> str:
    """What becomes of a program that waits, when so many signals come."""

    async def waiting() -> None:
        await asyncio.sleep(5)

    own = asyncio.create_task(waiting())
    await asyncio.sleep(0)
    for _ in range(times):
        session._signalled(own)
    done, _ = await asyncio.wait([own], timeout=0.05)
    own.cancel()
    return "ended" if done else "goes on"


@pytest.mark.parametrize(
    ("stepping", "times", "expected"),
    [(False, 1, "ended"), (True, 1, "goes on"), (True, 2, "ended")],
)
async def test_a_signal_waits_for_a_step_and_a_second_one_for_nothing(
    stepping: bool, times: int, expected: str
) -> None:
    session, said, _ = heed([])
    session.stepping = stepping
    assert await signalled(session, times) == expected
    assert session.ended == (expected == "ended") and session.stop.is_set() == stepping
    if stepping:
        assert said[0].startswith("stopping: step 5 is finished and a checkpoint written first; another Ctrl-C")
