"""State of a run, as its checkpoints keep it: step, data cursor, ledger, rank store, calibration.

The learner's own part lies beside it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from launch.record import run_directory
from launch.record.look_file import read_calibrator, write_calibrator
from launch.run.cursor import Cursor
from launch.run.pipeline import Ticket
from launch.run.system import System
from perception.config import Config
from perception.datasets import stated
from perception.errors import UserError
from perception.files import write_text
from perception.types import Sample
from reward_workers.combine import make_store
from reward_workers.ranking import RankStore, RankStoreState

CHECKPOINTS = "checkpoints"
LEARNER = "learner"
STATE = "state.json"
RANKS = "ranks.npz"
RANKED = "ranks.json"


@dataclass(slots=True)
class RunState:
    config: Config
    cursor: Cursor
    ranks: RankStore | None
    """None where the reward ranks nothing."""
    ledger: deque[Ticket] = field(default_factory=deque)
    """Prompts handed out and not yet learned from, oldest first; those that the cursor has given last."""
    step: int = 0
    before: dict[str, float] | None = None
    """Metrics of the starting policy, once evaluated."""
    earlier_seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)
    checkpoint: Path | None = None
    """The checkpoint that this run goes on from."""

    @classmethod
    def fresh(cls, config: Config, samples: Sequence[Sample]) -> RunState:
        return cls(config=config, cursor=Cursor(samples, config.run.seed), ranks=make_store(config.reward))

    @classmethod
    def resume(cls, config: Config, samples: Sequence[Sample]) -> RunState:
        """The newest complete checkpoint of `run.resume`. Raises UserError when there is none."""
        run_dir = run_directory.resume_dir(config.run)
        found = sorted((run_dir / CHECKPOINTS).glob(f"step-*/{STATE}"))
        if not found:
            raise UserError(f"run.resume={config.run.resume}: no checkpoint under {run_dir / CHECKPOINTS}")
        folder = found[-1].parent
        saved: Mapping[str, Any] = json.loads(found[-1].read_text())
        state = cls.fresh(config, samples)
        state.cursor.position, state.step = saved["position"], saved["step"]
        state.ledger.extend(Ticket(*ticket) for ticket in saved["ledger"])
        state.before, state.earlier_seconds, state.checkpoint = saved["before"], saved["seconds"], folder
        if state.ranks is not None:
            state.ranks.restore(_read_ranks(folder, run_dir))
        return state

    async def restore(self, system: System) -> None:
        """Learner first, then its weights into the engines, stamped with the checkpoint's version."""
        assert self.checkpoint is not None, "only a resumed run is restored"
        await system.learner.load(str((self.checkpoint / LEARNER).resolve()))
        if (calibrator := read_calibrator(self.checkpoint)) is not None:
            system.calibrator.restore(calibrator)
        await system.sync_weights(self.step)

    async def save(self, system: System, run_dir: Path) -> None:
        """A checkpoint counts once its state file is there, and that is written last."""
        folder = run_dir / CHECKPOINTS / f"step-{self.step:06d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        await system.learner.save(str((folder / LEARNER).resolve()))
        if self.ranks is not None:
            _write_ranks(folder, self.ranks.state())
        if self.config.look.mode == "relook":
            write_calibrator(folder, system.calibrator.export())
        saved = {
            "step": self.step,
            "position": self.cursor.position - len(self.ledger),
            "ledger": [(ticket.step, ticket.place) for ticket in self.ledger],
            "before": self.before,
            "seconds": self.seconds,
        }
        write_text(folder / STATE, json.dumps(saved))
        for older in sorted((run_dir / CHECKPOINTS).glob("step-*"))[:-2]:
            shutil.rmtree(older)

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.began

    def summary(self, after: Mapping[str, float], restarts: Mapping[str, int]) -> dict[str, Any]:
        """Contents of `summary.json`. `restarts`: actors restarted since this process began, by role."""
        return {
            "before": self.before,
            "after": dict(after),
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "restarts": dict(restarts),
            "seed": self.config.run.seed,
            "data": stated(self.config.data),
        }


def _write_ranks(folder: Path, ranks: RankStoreState) -> None:
    np.savez(folder / RANKS, **dict(ranks.rows))  # type: ignore[arg-type]  # numpy types the keyword allow_pickle only
    write_text(folder / RANKED, json.dumps({"names": ranks.names, "steps": dict(ranks.steps)}))


def _read_ranks(folder: Path, run_dir: Path) -> RankStoreState:
    if not (folder / RANKED).is_file():
        raise UserError(f"{run_dir} was trained without reward.rank=ecdf and cannot be continued with it")
    saved = json.loads((folder / RANKED).read_text())
    with np.load(folder / RANKS) as rows:
        return RankStoreState(
            names=tuple(saved["names"]), rows={name: rows[name] for name in rows.files}, steps=saved["steps"]
        )
