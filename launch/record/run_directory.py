"""Directory of a run: made whole or not at all, never written by two runs at once, never overwritten.

    config.yaml  environment.json  metrics.jsonl  evaluations.jsonl  timeline.jsonl
    summary.json  report.html  timeline.json
    rollouts/  checkpoints/  policy/  best/  profile/  wandb/

A new run takes the name `runs/<name>`; an older one of that name is moved aside to `<name>.1`, `<name>.2`, ...
"""

import errno
import fcntl
import json
import logging
from itertools import count
from pathlib import Path
from typing import IO, Any

import yaml

from perception.config import Config, RunConfig
from perception.errors import UserError
from perception.files import write_text

log = logging.getLogger(__name__)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # Lustre without `-o flock`, some FUSE

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
TIMELINE, TRACE = "timeline.jsonl", "timeline.json"
SUMMARY = "summary.json"
REPORT = "report.html"
ROLLOUTS = "rollouts"
POLICY, BEST, PROFILE = "policy", "best", "profile"
LOCK = ".lock"
SWEEP = "sweep.json"
OUTPUT = "output.log"
"""What a run of a sweep printed: it lies there before the run does, as multirun.yaml does before the sweep."""


def find(run: RunConfig) -> Path:
    """The directory that `run.resume`, or else `run.resume_weights`, names: a path, or a run under `run.output`.

    Raises UserError if there is no run.
    """
    key, name = ("resume", run.resume) if run.resume is not None else ("resume_weights", run.resume_weights or "")
    candidates = (Path(name), Path(run.output) / name)
    for candidate in candidates:
        if (candidate / CONFIG).is_file():
            return candidate
    missing = " and ".join(f"{candidate}/{CONFIG}" for candidate in candidates)
    raise UserError(f"run.{key}={name}: no run there ({missing} missing)")


def settings(run_dir: Path) -> dict[str, Any]:
    """What config.yaml says. Raises UserError."""
    try:
        return dict(yaml.safe_load((run_dir / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{run_dir / CONFIG} cannot be read: {' '.join(str(error).split())}") from error


def check_inputs(config: Config) -> None:
    """Raises UserError where a new run would move aside what it is to read."""
    data, model, run = config.data, config.model, config.run
    path = (Path(run.output) / run.name).resolve()
    reads = {"model.path": model.path, "model.segmenter": model.segmenter, "data.images": data.images}
    reads |= {"run.resume_weights": run.resume_weights and str(find(run))}
    reads |= {"data.train": data.train, "data.eval": data.eval}
    reads |= {f"data.also.{key}": one for key, one in data.also.items()}
    for key, read in reads.items():
        if run.resume is None and read and Path(read).resolve().is_relative_to(path):
            cure = f"choose another, as run.name={run.name}-2"
            raise UserError(f"{key}={read} lies in the directory of run.name={run.name}; {cure}")


def create(path: Path, marker: str = CONFIG) -> Path:
    """The directory for a new run, or for a sweep (`marker` SWEEP). An older one there is moved aside if it recorded
    anything.

    Raises UserError if the directory cannot be made, is in use, or holds something else.
    """
    try:
        if path.is_dir() and any(e.name[0] != "." and e.name not in (OUTPUT, "multirun.yaml") for e in path.iterdir()):
            if not (path / marker).is_file():
                raise UserError(
                    f"{path} holds files that are not a run or sweep; choose another run.name or run.output"
                )
            lock(path).close()
            if _recorded(path):
                asides = (path.with_name(f"{path.name}.{number}") for number in count(1))
                path.rename(next(aside for aside in asides if not aside.exists()))
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {path}: {error.strerror}; choose another run.output") from error
    return path


def lock(path: Path) -> IO[str]:
    """Hold the run for this process until the file is closed or the process ends, where the file system has locks.

    Raises UserError if it is held.
    """
    handle = (path / LOCK).open("a")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.close()
        raise UserError(f"{path} is being written by another run; choose another run.name or stop that run") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s: the file system has no locks (%s); nothing keeps two runs apart there", path, error.strerror)
    return handle


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every record of a JSONL file; a last line cut short by a killed process is left out. Raises UserError."""
    if not path.is_file():
        return []
    records: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}:{number}: not JSON ({error.msg}); mend or delete the line") from error
    return records


def forget_after(run_dir: Path, step: int) -> None:
    """Drop what was recorded after `step`, which a resumed run is about to record again."""
    for name in (METRICS, EVALUATIONS, TIMELINE):
        kept = [record for record in read_lines(run_dir / name) if record["step"] <= step]
        write_text(run_dir / name, "".join(json.dumps(record) + "\n" for record in kept))
    for path in (run_dir / ROLLOUTS).glob("*.parquet"):
        if int(path.stem.rpartition("-")[2]) > step:
            path.unlink()


def _recorded(path: Path) -> bool:
    return any(one.is_file() and one.stat().st_size > 0 for one in map(path.joinpath, (METRICS, EVALUATIONS, SWEEP)))
