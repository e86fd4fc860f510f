"""Recorder of a run: settings, metrics, rollouts, summary, and what trackers are told (files: `run_directory`)."""

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml

from launch.record import environment, rollouts, run_directory
from launch.record.trackers import EVALUATED, Tracked, Trackers
from launch.run.config import plain
from perception.config import Config
from perception.files import write_text
from perception.metric_catalog import headline
from perception.types import Group, Work

_EPOCH = time.time() - time.monotonic()


class Recorder(AbstractContextManager):
    """Owns a run's directory from start to end.

    A new run gets a fresh directory (an older one of the name is moved aside). With `resume_step`, the run that
    `config.run.resume` names is continued: what it recorded after that step is dropped and will be recorded again.
    Raises UserError when the directory cannot be made or another process is writing to it.
    """

    def __init__(self, config: Config, *, resume_step: int | None = None) -> None:
        resuming, own = resume_step is not None, Path(config.run.output) / config.run.name
        self.run_dir = run_directory.find(config.run) if resuming else run_directory.create(own)
        self._lock = run_directory.lock(self.run_dir)
        if resume_step is not None:
            run_directory.forget_after(self.run_dir, resume_step)
        self._kept, self._every = config.run.rollouts_kept, config.run.rollouts_every
        settings = plain(config)
        self._write_settings(settings, resume_step)
        self._trackers = Trackers(Tracked(config, settings, self.run_dir, resume_step))
        data = [Path(path) for path in (config.data.train, config.data.eval, *config.data.also.values())]
        self._trackers.tell(lambda one: one.artifact("data", [path for path in data if path.is_file()]))

    def step(self, step: int, metrics: Mapping[str, float], groups: Sequence[Group]) -> None:
        """Record one training step."""
        self._record(run_directory.METRICS, "train", step, metrics, groups)

    def evaluation(self, step: int, metrics: Mapping[str, float], groups: Sequence[Group] = ()) -> None:
        """Record a held-out evaluation of the policy after `step` steps; `groups` are kept for pictures."""
        self._record(run_directory.EVALUATIONS, "eval", step, metrics, groups)

    def worked(self, step: int, work: Iterable[Work]) -> None:
        """Record what was done until the end of this step, or after the last one, in Chrome's trace format."""
        with (self.run_dir / run_directory.TIMELINE).open("a", encoding="utf-8") as file:
            for who, doing, began, ended in work:
                event = {"step": step, "ph": "X", "pid": who, "tid": doing.partition(" ")[0], "name": doing}
                micros = {"ts": round((began + _EPOCH) * 1e6), "dur": round((ended - began) * 1e6)}
                file.write(json.dumps(event | micros) + "\n")

    def alert(self, title: str, text: str) -> None:
        """Tell those who watch the run from elsewhere."""
        self._trackers.tell(lambda one: one.alert(title, text))

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether a trained policy's headline metric is above those of all that were recorded before it."""
        earlier = run_directory.read_lines(self.run_dir / run_directory.EVALUATIONS)
        return headline(metrics) > max((headline(one) for one in earlier if one["step"]), default=-math.inf)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write summary.json in one step."""
        write_text(self.run_dir / run_directory.SUMMARY, json.dumps(values, indent=2) + "\n")

    def exported(self, policy: Path) -> None:
        """Tell the trackers of the exported policy."""
        self._trackers.tell(lambda one: one.artifact("policy", [policy]))

    def close(self) -> None:
        """Flush everything; waits a bounded time for trackers."""
        self._trackers.close()
        self._lock.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _record(self, name: str, phase: str, step: int, metrics: Mapping[str, float], groups: Sequence[Group]) -> None:
        # NaN and infinities are not JSON: they become null, which a chart shows as a gap.
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        with (self.run_dir / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        prefix = EVALUATED if phase == "eval" else ""
        self._trackers.tell(lambda one: one.log(step, {prefix + key: value for key, value in metrics.items()}))
        wanted = phase == "eval" or step % self._every == 0
        if wanted and (kept := groups[: self._kept]):
            table = self.run_dir / run_directory.ROLLOUTS / f"{phase}-{step:06d}.parquet"
            rollouts.write(table, step, kept)
            self._trackers.tell(lambda one: one.rollouts(step, table))

    def _write_settings(self, settings: dict[str, Any], resume_step: int | None) -> None:
        path = self.run_dir / run_directory.CONFIG
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        if resume_step is not None and (before := path.read_text(encoding="utf-8")) != text:
            write_text(path.with_name(f"config.until-{resume_step:06d}.yaml"), before)
        write_text(path, text)
        write_text(self.run_dir / run_directory.ENVIRONMENT, json.dumps(environment.describe(), indent=2) + "\n")
