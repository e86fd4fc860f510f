"""Does it help? GRPO with and without each published part, over several seeds, from one warm start.

    python -m benchmarks.ablation [--steps 60] [--seeds 42 1 2] [--jobs 2] [--json] [-- learner.lr=5e-5 ...]

Every arm gets the same warm start, steps and samples per step. A run that is already there, finished, with the same
settings and nothing newer beneath it, is not trained again: after an interruption the same command goes on. Writes
`ablation.md` and `ablation.json` under --out, and keeps every run and its log there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL
from typing import Any, NoReturn

import yaml
from pydantic import TypeAdapter

from benchmarks import ablation_table as table
from benchmarks.common import parser, print_result
from launch.record import run_directory
from launch.run.command_line import told
from launch.run.config import compose
from perception.config import Config
from perception.errors import UserError
from perception.files import write_text
from synthetic.prepare import prepare

ARMS = {
    "binary": ("reward=vision_reasoner", "look=none"),
    "look": ("reward=vision_reasoner_look", "look=inline"),
    "rank": ("reward=dr_seg_no_look", "look=none"),
    "both": ("reward=dr_seg", "look=inline"),
    "raw": ("reward=dr_seg", "look=inline", "reward.rank=none"),
    "relook": ("reward=dr_seg_no_look", "look=relook"),
}
COMMON = (
    "learner.ranks=1",
    f"data.also.{table.SHIFTED}=data/world/shifted.json",
    "wandb.mode=disabled",
    "run.rollouts_kept=2",
    "run.checkpoint_every=1000",
)
GRACE_S = 30.0
"""For a run that was told to stop, before it is killed."""
LOG_TAIL = 5
RESULTS = "ablation.json"


class RunError(Exception):
    """A run did not end well. The message names it and quotes the end of its log."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One arm with one seed."""

    arm: str
    seed: int
    overrides: tuple[str, ...]
    config: Config

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run.output) / self.config.run.name

    @property
    def command(self) -> tuple[str, ...]:
        return (sys.executable, "-m", "launch.train", *self.overrides)


def run_name(arm: str, seed: int) -> str:
    return f"ablation-{arm}-{seed}"


def plan(arm: str, seed: int, steps: int, out: Path, extra: Sequence[str]) -> Planned:
    """Raises UserError for an override that does not fit."""
    own = (f"run.seed={seed}", f"run.name={run_name(arm, seed)}", f"run.output={out}", f"algorithm.steps={steps}")
    overrides = ("recipe=quickstart", *ARMS[arm], *own, *COMMON, *extra)
    return Planned(arm, seed, overrides, compose(overrides))


def finished(planned: Planned) -> bool:
    """The run has its summary and the planned settings; neither the warm start nor the data changed since it began."""
    config = planned.run_dir / run_directory.CONFIG
    if not (planned.run_dir / run_directory.SUMMARY).is_file() or not config.is_file():
        return False
    wanted = TypeAdapter(Config).dump_python(planned.config, mode="json")
    if yaml.safe_load(config.read_text(encoding="utf-8")) != wanted:
        return False
    data = planned.config.data
    beneath = [*Path(planned.config.model.path).glob("*.safetensors"), *map(Path, (data.train, data.eval))]
    beneath += map(Path, data.also.values())
    return all(path.stat().st_mtime <= config.stat().st_mtime for path in beneath if path.exists())


async def run_all(
    commands: Mapping[str, Sequence[str]], out: Path, at_once: int, limit_s: float, done: Callable[[str], None]
) -> None:
    """Every command, by name, `at_once` at a time, each with a log under `out`; `done` is called as each ends well.

    The first that fails or outlasts `limit_s` raises RunError, and the others are stopped.
    """
    out.mkdir(parents=True, exist_ok=True)
    gate = asyncio.Semaphore(at_once)

    async def one(name: str, command: Sequence[str]) -> None:
        async with gate:
            await _run(name, command, _log(out, name), limit_s)
        done(name)

    tasks = [asyncio.create_task(one(*pair)) for pair in commands.items()]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run(name: str, command: Sequence[str], log: Path, limit_s: float) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        if await asyncio.wait_for(process.wait(), limit_s):
            raise RunError(f"{name} failed with exit status {process.returncode}; {_tail(log)}")
    except TimeoutError as error:
        raise RunError(f"{name} was not done after {limit_s:g} s and was stopped; {_tail(log)}") from error
    finally:
        if process.returncode != 0:
            await _stop(process)


async def _stop(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError, TimeoutError):
        process.terminate()
        await asyncio.wait_for(process.wait(), GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # it, or what it left behind
    await process.wait()


def terminate(*_: object) -> NoReturn:
    """Signal handler: the runs end with this process, as they do on Ctrl-C."""
    sys.exit(143)


def _log(out: Path, name: str) -> Path:
    return out / f"{name}.log"


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    last = [line for line in lines if line.strip()][-LOG_TAIL:]
    return "\n    ".join([f"{log} ends with", *last])


def train(wanted: Sequence[tuple[str, int]], arguments: argparse.Namespace, command: str) -> None:
    """Every run that is not there yet. The results are written anew after each, so that an interruption leaves them."""
    out = arguments.out
    plans = {run_name(*pair): plan(*pair, arguments.steps, out, arguments.overrides) for pair in wanted}
    prepare(next(iter(plans.values())).config, _say)  # before any run starts: no two of them write it at once
    ready = [name for name, one in plans.items() if finished(one)]
    missing = {name: one.command for name, one in plans.items() if name not in ready}
    _say(f"{len(ready)} of {len(plans)} runs are there; training {len(missing)}, {arguments.jobs} at a time")

    def done(name: str) -> None:
        if not (out / name / run_directory.SUMMARY).is_file():
            raise RunError(f"{name} was stopped before its end; {_tail(_log(out, name))}")
        ready.append(name)
        write_results(out, [(plans[name].arm, plans[name].seed) for name in ready], command)
        _say(f"{name} is done, {len(ready)} of {len(plans)}")

    asyncio.run(run_all(missing, out, arguments.jobs, arguments.limit_s, done))


def write_results(out: Path, wanted: Sequence[tuple[str, int]], command: str) -> dict[str, Any]:
    """Tables and figures of finished runs; returns the arms' figures. Raises UserError if they do not compare."""
    runs: dict[str, dict[int, table.Run]] = {}
    for arm, seed in sorted(wanted, key=lambda pair: list(ARMS).index(pair[0])):
        runs.setdefault(arm, {})[seed] = table.read(out / run_name(arm, seed))
    figures = table.figures(runs)
    every = [
        {"arm": arm, "seed": seed, "before": run.before, "after": run.after, **run.training}
        for arm, by_seed in runs.items()
        for seed, run in by_seed.items()
    ]
    write_text(out / "ablation.md", table.page(runs, command, ARMS))
    write_text(out / RESULTS, json.dumps({"command": command, "arms": figures, "runs": every}, indent=2) + "\n")
    return figures


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _ablate(arguments: argparse.Namespace, command: str) -> dict[str, Any]:
    wanted = [(arm, seed) for seed in dict.fromkeys(arguments.seeds) for arm in dict.fromkeys(arguments.arms)]
    out = arguments.out
    if not arguments.table_only:
        train(wanted, arguments, command)
        return write_results(out, wanted, command)
    there = [pair for pair in wanted if (out / run_name(*pair) / run_directory.SUMMARY).is_file()]
    if not there:
        raise UserError(f"no finished run under {out}: run this without --table-only")
    trained_by = json.loads((out / RESULTS).read_text())["command"] if (out / RESULTS).is_file() else command
    return write_results(out, there, trained_by)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--steps", type=_positive, default=60)
    made.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    made.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS))
    made.add_argument("--jobs", type=_positive, default=2, help="runs at a time")
    made.add_argument("--limit-s", type=_positive, default=5400, help="seconds that one run may take")
    made.add_argument("--out", type=Path, default=Path("runs/ablation"))
    made.add_argument("--table-only", action="store_true", help="train nothing: write the results of what is there")
    made.add_argument("overrides", nargs="*", help="after --, as for launch.train")
    arguments = made.parse_args()
    signal.signal(signal.SIGTERM, terminate)
    try:
        with told():
            figures = _ablate(arguments, shlex.join(["python", "-m", "benchmarks.ablation", *sys.argv[1:]]))
    except RunError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "out", "table_only")}
        print_result("ablation", figures, None, None, settings, out=str(arguments.out))
    else:
        print((arguments.out / "ablation.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
