"""State of a run, as its checkpoints keep it: step, data cursor, ledger, rank store, calibration.

A checkpoint is a folder that appears whole: the learner's files (`learner/checkpoint.py`) and ours. `state.json` also
says what it was made with; SHA256SUMS covers every file (`sha256sum -c SHA256SUMS`).
"""

import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np

from launch.record import run_directory
from launch.record.look_file import read_calibrator, write_calibrator
from launch.run.cursor import Cursor
from launch.run.pipeline import Ticket
from launch.run.samples import fingerprint
from launch.run.system import System
from perception.config import Config, LearnerConfig, ModelConfig
from perception.datasets import stated
from perception.errors import UserError
from perception.files import replacing, sha256, write_text
from perception.types import Sample
from reward_workers.combine import make_store
from reward_workers.ranking import RankStore, RankStoreState

CHECKPOINTS = "checkpoints"
LEARNER = "learner"
STATE = "state.json"
RANKS = "ranks.npz"
RANKED = "ranks.json"
SUMS = "SHA256SUMS"
FITTING = ("lora", "freeze_vision", "parameters", "trained")
"""What must be the same where a checkpoint is read, out of all that it says it was made with."""


@dataclass(slots=True)
class RunState:
    config: Config
    cursor: Cursor
    ranks: RankStore | None
    """None where the reward ranks nothing."""
    data: dict[str, Any]
    """The training samples' `fingerprint`."""
    ledger: deque[Ticket] = field(default_factory=deque)
    """Prompts handed out and not yet learned from, oldest first; those that the cursor has given last."""
    step: int = 0
    before: dict[str, float] | None = None
    """Metrics of the starting policy, once evaluated."""
    earlier_seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)
    checkpoint: Path | None = None
    """The checkpoint that this run goes on from, or takes its weights from."""

    @classmethod
    def start(cls, config: Config, samples: Sequence[Sample], say: Callable[[str], None] = print) -> Self:
        """A new run's, with the weights of `run.resume_weights` if it is set; or that of the newest whole checkpoint of
        `run.resume`. Says which checkpoints are broken. Raises UserError where there is none, or it does not fit."""
        run, data = config.run, fingerprint(config.data, samples)
        state = cls(config=config, cursor=Cursor(samples, run.seed), ranks=make_store(config.reward), data=data)
        if run.resume is None and run.resume_weights is None:
            return state
        run_dir = run_directory.find(run)
        state.checkpoint, saved = _newest(run_dir, say)
        made = {key: saved["made_with"][key] for key in FITTING}
        _compare(f"{state.checkpoint} was made with", made, made_with(config.model, config.learner))
        if run.resume is None:
            return state
        if not run.new_data:
            new = "; with run.new_data=true it goes on with these, from the first one"
            _compare(f"{state.checkpoint} learned from", saved["data"], data, new)
        position, ledger = (saved["position"], saved["ledger"]) if saved["data"] == data else (0, ())
        state.cursor.position, state.step = position, saved["step"]
        state.ledger.extend(Ticket(*ticket) for ticket in ledger)
        state.before, state.earlier_seconds = saved["before"], saved["seconds"]
        if state.ranks is not None:
            state.ranks.restore(_read_ranks(state.checkpoint, run_dir))
        return state

    async def restore(self, system: System) -> None:
        """Learner first, then its weights into the engines, stamped with the checkpoint's version."""
        assert self.checkpoint is not None, "only what a checkpoint keeps is restored"
        learner = str((self.checkpoint / LEARNER).resolve())
        await system.learner.load(learner, weights_only=self.config.run.resume is None)
        if (calibrator := read_calibrator(self.checkpoint)) is not None:
            system.calibrator.restore(calibrator)
        await system.sync_weights(self.step)

    async def save(self, system: System, run_dir: Path) -> None:
        """Keeps this checkpoint and the one before it."""
        folder = run_dir / CHECKPOINTS / f"step-{self.step:06d}"
        folder.parent.mkdir(exist_ok=True)
        with replacing(folder) as scratch:
            scratch.mkdir()
            learner = await system.learner.save(str((scratch / LEARNER).resolve()))
            if self.ranks is not None:
                _write_ranks(scratch, self.ranks.state())
            if self.config.look.mode == "relook":
                write_calibrator(scratch, system.calibrator.export())
            ledger = [(ticket.step, ticket.place) for ticket in self.ledger]
            saved = {"step": self.step, "position": self.cursor.position - len(ledger), "ledger": ledger}
            saved |= {"before": self.before, "seconds": self.seconds, "data": self.data}
            saved |= {"made_with": made_with(self.config.model, self.config.learner)}
            sums = {f"{LEARNER}/{name}": checksum for name, checksum in learner.items()}
            sums |= {path.name: sha256(path) for path in scratch.iterdir() if path.is_file()}
            write_text(scratch / STATE, json.dumps(saved))
            sums[STATE] = sha256(scratch / STATE)
            write_text(scratch / SUMS, "".join(f"{checksum}  {name}\n" for name, checksum in sums.items()))
        for older in sorted(folder.parent.glob("step-*"))[:-2]:
            shutil.rmtree(older)

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.began

    def summary(self, after: Mapping[str, float], restarts: Mapping[str, int]) -> dict[str, Any]:
        """Contents of `summary.json`. `restarts`: actors restarted since this process began, by role."""
        measured = {"before": self.before, "after": dict(after), "steps": self.step, "seconds": round(self.seconds, 1)}
        data = stated(self.config.data)
        return {**measured, "restarts": dict(restarts), "seed": self.config.run.seed, "data": data}


@cache
def made_with(model: ModelConfig, learner: LearnerConfig) -> dict[str, Any]:
    """What a checkpoint says of the policy and the learner that made it."""
    from launch.run.memory import measure  # imports transformers: seconds

    size, chosen = measure(model, learner), asdict(learner)
    made = {key: chosen[key] for key in ("ranks", "zero_stage", "lora", "freeze_vision")}
    return {"parameters": size.parameters, "trained": size.trained, "dtype": model.dtype, **made}


def _compare(what: str, was: Mapping[str, Any], now: Mapping[str, Any], cure: str = "") -> None:
    for key, value in was.items():
        if json.dumps(now[key]) != json.dumps(value):
            raise UserError(f"{what} {key}={value}, but now it is {now[key]}{cure}")


def _newest(run_dir: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that is whole, and its state."""
    for folder in sorted((run_dir / CHECKPOINTS).glob("step-*"), reverse=True):
        try:
            return folder, _read(folder)
        except UserError as error:
            say(f"warning: {error}; the checkpoint before it is taken")
    raise UserError(f"{run_dir / CHECKPOINTS}: no whole checkpoint there (run.checkpoint_every)")


def _read(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint, all of whose files are as they were written; else a UserError names one."""
    try:
        sums = [line.split("  ", 1) for line in (folder / SUMS).read_text(encoding="utf-8").splitlines()]
        if not sums or sums[-1][-1] != STATE:
            raise ValueError(f"{folder / SUMS} is cut short")
        for checksum, name in sums:
            if sha256(folder / name) != checksum:
                raise ValueError(f"{folder / name} is damaged, or its line in {SUMS} is")
        return dict(json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is broken: {error}") from error


def _write_ranks(folder: Path, ranks: RankStoreState) -> None:
    np.savez(folder / RANKS, **dict(ranks.rows))  # type: ignore[arg-type]  # numpy types the keyword allow_pickle only
    write_text(folder / RANKED, json.dumps({"names": ranks.names, "steps": dict(ranks.steps)}))


def _read_ranks(folder: Path, run_dir: Path) -> RankStoreState:
    if not (folder / RANKED).is_file():
        raise UserError(f"{run_dir} was trained without reward.rank=ecdf and cannot be continued with it")
    saved = json.loads((folder / RANKED).read_text())
    with np.load(folder / RANKS) as rows:
        return RankStoreState(names=tuple(saved["names"]), rows=dict(rows), steps=saved["steps"])
