"""Guards the timeline: an actor is busy exactly while a call is in flight, the controller in its phases; what is
written has Chrome's trace format, goes on where a run is resumed, and is what the report draws; `run.profile_steps`."""

from __future__ import annotations

import asyncio
import gzip
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.record import progress as progress_module
from launch.record import run_directory
from launch.record.progress import Progress
from launch.record.recorder import Recorder
from launch.run.checks import check_settings, profiled
from perception.errors import UserError
from perception.types import Work
from report import STRETCHES_SHOWN, write_report
from runtime import actors
from runtime.actors import ActorPool, Call, Limit
from runtime.placement import Seat
from runtime.tracing import Traced
from tests.builders import changed
from tests.fake_run import config, write_run

PATIENT = Limit(1e9, "patience_s")
UNTIL = 12

times = st.integers(0, UNTIL)
calls = st.tuples(st.integers(0, 1), st.sampled_from(["score", "examine"]), times, times).filter(lambda c: c[2] < c[3])
"""(actor, method, sent at, answered at)."""


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@settings(max_examples=40)
@given(wanted=st.lists(calls, max_size=8), asked=st.sets(times, max_size=3))
def test_an_actor_is_busy_exactly_while_a_call_is_in_flight(
    wanted: list[tuple[int, str, int, int]], asked: set[int]
) -> None:
    """In stretches that do not overlap, whenever they are asked for."""
    clock, found = Clock(), list[Work]()

    async def play(pool: ActorPool[Any]) -> None:
        replies = [asyncio.get_running_loop().create_future() for _ in wanted]
        tasks = []
        for clock.now in range(UNTIL + 1):
            for (actor, method, sent, answered), reply in zip(wanted, replies, strict=True):
                if answered == clock.now:
                    reply.set_result(None)
                    await asyncio.sleep(0)
                if sent == clock.now:
                    one: Call[Any, None] = Call(method, (reply,), {})
                    tasks.append(asyncio.create_task(pool._answer(pool.slots[actor], one, PATIENT, "late")))
                await asyncio.sleep(0)
            if clock.now in asked:
                found.extend(pool.worked())
        await asyncio.gather(*tasks)
        found.extend(pool.worked())

    async def answer(limit: Limit, late: str, reply: Any) -> Any:
        return await reply

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actors, "time", clock)
        patch.setattr(actors, "_sent", lambda actor, wanted: wanted.arguments[0])
        patch.setattr(actors, "_within", answer)
        asyncio.run(play(ActorPool("worker", object, lambda _: (), [Seat(1, 0)] * 2, start=PATIENT)))
    for actor in range(2):
        for method in ("score", "examine"):
            own = [(began, ended) for who, doing, began, ended in found if (who, doing) == (f"worker {actor}", method)]
            spans = [(sent, answered) for *key, sent, answered in wanted if key == [actor, method]]
            for tick in range(UNTIL):
                busy = any(sent <= tick < answered for sent, answered in spans)
                assert sum(began <= tick < ended for began, ended in own) == busy


def test_the_controller_is_busy_with_its_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    progress = Progress(2)
    clock.now = 1.0
    progress.phase("starting")
    clock.now = 5.0
    progress.phase("step 1", announce=False)
    clock.now = 7.0
    progress.step(1, {})
    before = ("controller", "checking settings and models", 0.0, 1.0)
    assert progress.worked() == [before, ("controller", "starting", 1.0, 5.0), ("controller", "step 1", 5.0, 7.0)]
    clock.now = 8.0
    progress.phase("evaluating")
    assert progress.worked() == []  # between the step and this there was nothing


def drawn(page: Path) -> list[dict[str, Any]]:
    found = re.search(r"data-timeline='([^']*)'", page.read_text(encoding="utf-8"))
    return list(json.loads(html.unescape(found[1]))) if found else []


def test_what_is_recorded_is_a_trace_that_the_report_draws(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=3)
    page = write_report(run_dir)
    events = json.loads((run_dir / "timeline.json").read_text())["traceEvents"]
    assert drawn(page) == events and len(events) == 3 * 8
    assert all(one["ph"] == "X" and one["dur"] > 0 and isinstance(one["ts"], int) for one in events)
    engine = [one for one in events if one["pid"] == "rollout engine 0" and one["name"] == "generate"]
    assert [one["step"] for one in engine] == [1, 2, 3]
    assert engine[1]["ts"] - engine[0]["ts"] == pytest.approx(10e6, abs=1)  # in microseconds
    assert {one["tid"] for one in events if one["pid"] == "controller"} == {"step"}  # all steps in one row


def test_a_resumed_run_records_its_steps_once(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=3)
    with Recorder(changed(config(tmp_path, steps=3), "run", resume=str(run_dir)), resume_step=2) as recorder:
        recorder.worked(3, [("controller", "step 3", 1.0, 2.0)])
    lines = run_directory.read_lines(run_dir / run_directory.TIMELINE)
    assert [one["step"] for one in lines if one["pid"] == "controller"] == [1, 2, 3]
    assert [one["dur"] for one in lines if one["step"] == 3] == [1_000_000]


def test_a_run_without_a_timeline_has_none_to_draw_and_a_long_one_its_end(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=1)
    path = run_dir / run_directory.TIMELINE
    line = path.read_text().splitlines()[0]
    path.write_text(f"{line}\n" * (STRETCHES_SHOWN + 5))
    assert len(drawn(write_report(run_dir))) == STRETCHES_SHOWN
    path.unlink()
    assert "<h2>Timeline" not in write_report(run_dir).read_text()


# ---------------------------------------------------------------- run.profile_steps


@pytest.mark.parametrize(
    ("given", "steps"),
    [(None, []), ("1:1", [1]), ("3:5", [3, 4, 5]), ("31:40", list(range(31, 41))), ("03:5", None), ("0:3", None)]
    + [(bad, None) for bad in ("5:3", "31:41", "32:41", "3", "3-5", "3:", ":5", "", "a:b", "1:2:3", "-1:3", "185")],
)
def test_the_profiled_steps_are_a_short_range_of_the_runs(
    given: str | None, steps: list[int] | None, tmp_path: Path
) -> None:
    one = changed(config(tmp_path, steps=40), "run", profile_steps=given)
    if steps is not None:
        assert list(profiled(one)) == steps
        check_settings(one)
        return
    with pytest.raises(UserError, match=rf"^run\.profile_steps={given}: .* as \"3:5\", at most 10 of .*steps=40$"):
        check_settings(one)


class Worker(Traced):
    def work(self) -> None:
        weight = torch.ones(3, 3, requires_grad=True)
        (torch.ones(2, 3) @ weight).sum().backward()


def names(path: Path) -> list[str]:
    return [one["name"] for one in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"] if one["ph"] == "X"]


def test_a_trace_has_what_was_computed_between_its_two_calls(tmp_path: Path) -> None:
    worker = Worker()
    worker.work()
    for _ in range(3):  # it begins once
        worker.trace()
        worker.work()
    worker.trace(str(tmp_path / "profile" / "worker.json.gz"))
    worker.work()
    found = names(tmp_path / "profile" / "worker.json.gz")
    assert found.count("MmBackward0") == 3 and found.count("aten::matmul") == 3
    worker.trace()
    worker.trace(str(tmp_path / "again.json.gz"))
    assert "aten::matmul" not in names(tmp_path / "again.json.gz")


def test_an_engine_is_traced_for_some_forward_passes_only(tmp_path: Path) -> None:
    class Stepped(Worker):
        _relook_schedule = staticmethod(torch.profiler.schedule(wait=0, warmup=0, active=2, repeat=1))

    worker = Stepped()
    worker.trace()
    for _ in range(5):  # as vLLM does
        worker._relook_profiler.step()
        worker.work()
    worker.trace(str(tmp_path / "engine.json.gz"))
    assert names(tmp_path / "engine.json.gz").count("MmBackward0") == 1  # a step's number ends before its pass


def test_a_worker_that_was_restarted_in_between_writes_nothing(tmp_path: Path) -> None:
    Worker().trace(str(tmp_path / "restarted.json.gz"))
    assert list(tmp_path.iterdir()) == []
