"""The ablation's runs as real processes: how many at once, logs, and runs that fail, hang or are told to end."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from benchmarks import ablation
from benchmarks.ablation import RunError, run_all


def shell(script: str) -> list[str]:
    return ["bash", "-c", script]


def test_at_most_so_many_run_at_once_and_each_keeps_a_log(tmp_path: Path) -> None:
    script = f"cd {tmp_path}; touch $0; sleep 0.3; ls one two three four 2>/dev/null | wc -l; rm $0"
    ended: list[str] = []
    commands = {name: [*shell(script), name] for name in ("one", "two", "three", "four")}
    asyncio.run(run_all(commands, tmp_path, 2, 20, ended.append))
    assert sorted(ended) == ["four", "one", "three", "two"]
    assert all(int((tmp_path / f"{name}.log").read_text()) <= 2 for name in ended)


def test_a_failing_run_is_named_with_the_end_of_its_log_and_stops_the_others(tmp_path: Path) -> None:
    commands = {
        "slow": shell(f"trap 'touch {tmp_path}/told; exit 0' TERM; sleep 60 & wait"),
        "bad": shell("sleep 0.5; echo fine; echo error: no such weights >&2; exit 2"),
    }
    with pytest.raises(RunError, match=r"bad failed with exit status 2[^$]*fine\n *error: no such weights$"):
        asyncio.run(run_all(commands, tmp_path, 2, 20, lambda name: None))
    assert (tmp_path / "told").exists()


def test_a_run_past_its_limit_is_killed_with_its_children_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "GRACE_S", 0.3)
    hangs = shell("trap '' TERM; sleep 60 & echo $$; echo $!; wait")
    with pytest.raises(RunError, match=r"hangs was not done after 0\.5 s"):
        asyncio.run(run_all({"hangs": hangs}, tmp_path, 1, 0.5, lambda name: None))
    pids = [int(line) for line in (tmp_path / "hangs.log").read_text().split()]
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    """A zombie that nobody has waited for yet is dead."""
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_being_told_to_end_stops_the_runs(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGUSR1, ablation.terminate)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(SystemExit):
            asyncio.run(run_all({"run": shell("echo $$; exec sleep 60")}, tmp_path, 1, 20, lambda name: None))
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert not alive(int((tmp_path / "run.log").read_text()))
