"""Trackers: programs in which runs are watched and compared. Each is fed by a thread of its own: neither its start nor
its network or failures hold up a step.

    @TRACKERS.register("name")
    class MyTracker(Tracker): ...

A tracker is made in its thread, from the run that it follows; `run.trackers` names it.
"""

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from perception.config import Config
from perception.errors import UserError
from perception.registry import Registry, import_all

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 60.0
EVALUATED = "eval/"
"""Begins the name of a held-out metric."""


class Tracked(NamedTuple):
    """The run that is followed."""

    config: Config
    settings: Mapping[str, Any]
    """The config in plain values."""
    run_dir: Path
    resume_step: int | None = None
    """The run goes on from there: what was told of later steps does not hold."""


class Tracker:
    """What a tracker is told. Whatever it raises is one warning, and the run goes on without it."""

    package: str
    """Importable package that it needs."""

    def __init__(self, run: Tracked) -> None:
        """Called in its thread."""

    @staticmethod
    def wanted(config: Config) -> bool:
        """Its own settings do not switch it off."""
        return True

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Metrics by their names in `perception.metric_catalog`; those of a held-out evaluation begin with `eval/`."""

    def rollouts(self, step: int, table: Path) -> None:
        """A table that `launch.record.rollouts` wrote, `train-*` or `eval-*`."""

    def artifact(self, kind: str, paths: Sequence[Path]) -> None:
        """Files or folders that the run read (`data`) or made (`policy`)."""

    def alert(self, title: str, text: str) -> None:
        """Something that a person should look at now."""

    def close(self) -> None:
        """Flush what was told."""


TRACKERS: Registry[type[Tracker]] = Registry("tracker")
_Events = queue.SimpleQueue[Callable[[Tracker], Any] | None]


class Trackers:
    """The trackers of one run, told everything in order."""

    def __init__(self, run: Tracked) -> None:
        self._fed: list[tuple[threading.Thread, _Events]] = []
        for name in run.config.run.trackers:
            if TRACKERS[name].wanted(run.config):
                events: _Events = queue.SimpleQueue()
                thread = threading.Thread(target=_follow, args=(name, run, events), name=name, daemon=True)
                thread.start()
                self._fed.append((thread, events))

    def tell(self, what: Callable[[Tracker], None]) -> None:
        """Let each of them do it, later, in its own thread."""
        for _, events in self._fed:
            events.put(what)

    def close(self) -> None:
        """Flush what was told; gives up after CLOSE_TIMEOUT_S with a warning."""
        self.tell(lambda tracker: tracker.close())
        for thread, events in self._fed:
            events.put(None)
            thread.join(CLOSE_TIMEOUT_S)
            if thread.is_alive():
                log.warning("%s did not finish within %.0f s; records may be missing", thread.name, CLOSE_TIMEOUT_S)


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError for a tracker that is unknown or not installed."""
    for name in names:
        if find_spec(package := TRACKERS[name].package) is None:
            raise UserError(f"run.trackers: {name} needs {package}, which is not installed: pip install {package}")


def _follow(name: str, run: Tracked, events: _Events) -> None:
    try:
        tracker = TRACKERS[name](run)
        while (what := events.get()) is not None:
            what(tracker)
    except Exception as error:  # noqa: BLE001 - whatever a tracker raises is no reason to end a training run
        log.warning("%s stopped, the run goes on without it: %s", name, error)


import_all(__name__)
