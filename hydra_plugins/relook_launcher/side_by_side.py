"""Sweeps: `python -m launch.train --multirun recipe=quickstart learner.lr=2e-5,5e-5 hydra.launcher.at_once=2`.

A combination is a `launch.train` of its own. What it prints goes to `output.log` in its run's directory; a failure is
one line, and the sweep goes on. All join the cluster that RAY_ADDRESS names; without one, each starts its own Ray, or
all share one where several run at once. After a signal no combination begins, and those that run end as a run does:
after their step, with a second signal at once.
"""

import asyncio
import ctypes
import math
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, Process, create_subprocess_exec
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from hydra_plugins.relook_launcher.names import combination_name
from launch.record import run_directory
from launch.run.command_line import told
from perception.config import PlacementConfig
from perception.errors import UserError
from report.sweep import Combination, read_sweep, save_sweep
from runtime import cluster

PROGRAM = (sys.executable, "-m", "launch.train")
SETTINGS = {"_target_": f"{__name__}.SideBySide", "at_once": 1}
_LIBC, _PR_SET_PDEATHSIG = ctypes.CDLL(None), 1

ConfigStore.instance().store(group="hydra/launcher", name="side_by_side", node=SETTINGS)


class SideBySide(Launcher):
    def __init__(self, at_once: int) -> None:
        self.at_once, self.signals = max(1, at_once), 0
        self.combinations: list[Combination] = []
        self.running: set[Process] = set()

    def setup(self, *, config: DictConfig, **_: Any) -> None:
        """Takes the sweep's folder; an older sweep of that name is moved aside. Raises UserError."""
        given = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        self.fixed = {one.get_key_element(): str(one.input_line) for one in given if not one.is_sweep_override()}
        sources = config.hydra.runtime.config_sources
        self.flags = [f"--config-dir={one.path}" for one in sources if one.provider == "command-line"]
        self.folder = run_directory.create(Path(config.hydra.sweep.dir), run_directory.SWEEP)
        self.lock = run_directory.lock(self.folder)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """What each returns is its last headline metric, higher is better; None where it failed."""
        if self.at_once > 1 and cluster.cluster_address() is None:
            cluster.connect(PlacementConfig(name="shared", device="cpu"))
            os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        batch = [self._combination(words) for words in job_overrides]
        asyncio.run(self._run_all(batch))
        if self.signals:
            conclude(self.folder, 130)
        values = [one.value() if one.failed == "" else math.nan for one in batch]
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=v if math.isfinite(v) else None) for v in values]

    def _combination(self, words: Sequence[str]) -> Combination:
        pairs = (word.partition("=") for word in words)
        swept = {key: value for key, _, value in pairs if key not in self.fixed}
        name = combination_name(swept, {one.run_dir.name for one in self.combinations})
        self.combinations.append(Combination(self.folder / name, swept))
        return self.combinations[-1]

    async def _run_all(self, batch: Sequence[Combination]) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._signalled)
        gate = asyncio.Semaphore(self.at_once)
        await asyncio.gather(*(self._run(one, gate) for one in batch))

    async def _run(self, one: Combination, gate: asyncio.Semaphore) -> None:
        """A combination, from its turn to its end."""
        async with gate:
            one.failed = "not begun: the sweep was stopped" if self.signals else _why(*await self._ended(one))
            print(f"{one.run_dir.name}: {one.failed or f'done, {one.value():.3f}'}", flush=True)
            save_sweep(self.folder, self.combinations)

    async def _ended(self, one: Combination) -> tuple[int, Path]:
        """The exit status of its run, and the run's directory."""
        folder = str(self.folder).replace('"', r"\"")
        words = [*self.flags, *self.fixed.values(), *(f"{key}={value}" for key, value in one.swept.items())]
        one.run_dir.mkdir(exist_ok=True)
        with (one.run_dir / run_directory.OUTPUT).open("wb") as output:
            process = await create_subprocess_exec(
                *(*PROGRAM, *words, f'run.output="{folder}"', f"run.name={one.run_dir.name}"),
                env={**os.environ, "PYTHONUNBUFFERED": "1", "WANDB_RUN_GROUP": self.folder.name},
                stdin=DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a terminal's Ctrl-C is for the sweep, which passes it on
                preexec_fn=lambda: _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
            )
        self.running.add(process)
        if self.signals:  # one came while it was being started
            process.terminate()
        print(f"{one.run_dir.name}: begins, {output.name}", flush=True)
        status = await process.wait()
        self.running.discard(process)
        return status, one.run_dir

    def _signalled(self) -> None:
        self.signals += 1
        if self.signals == 1:
            print("stopping: what runs ends after its step; a second Ctrl-C or SIGTERM ends it now", flush=True)
        for process in self.running:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM if self.signals < 3 else signal.SIGKILL)


class Sweep(Callback):
    """Beginning and end of a sweep: Hydra calls it; an exception would be a warning there."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        keys = [word.partition("=")[0] for word in config.hydra.overrides.task]
        with told():
            if config.hydra.launcher.get("_target_") != SETTINGS["_target_"]:
                raise UserError("a combination is a run of its own: leave hydra/launcher as it is")
            if Path(sys.argv[0]).stem == "evaluate" or "run.resume" in keys:
                raise UserError("--multirun makes new runs: it goes neither with launch.evaluate nor with run.resume")

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        conclude(Path(config.hydra.sweep.dir), 2)


def conclude(folder: Path, status: int) -> None:
    """Say where the page is. Where a combination failed, say so and end the program with this status."""
    combinations = read_sweep(folder)
    print(f"report   {(folder / run_directory.REPORT).resolve()}")
    if failed := sum(one.failed != "" for one in combinations):
        print(f"error: {failed} of {len(combinations)} combinations failed", file=sys.stderr)
        sys.exit(status)


def _why(status: int, run_dir: Path) -> str:
    """Why a run that ended has no result, in one line; "" if it has one."""
    if status == 0:
        done = (run_dir / run_directory.SUMMARY).is_file()
        return "" if done else f"stopped before its last step; go on with run.resume={run_dir}"
    lines = [line for line in (run_dir / run_directory.OUTPUT).read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error: ")] or lines or ["it said nothing"]
    return f"exit status {status}: {told[-1].strip()}"[:400]
