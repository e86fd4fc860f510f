"""All that only a GPU can show, on one GPU in under 40 minutes: tests, then figures, as one JSON file.

    benchmarks/gpu_hour.sh gpu.json          # exit 1 if a step failed; the others were taken all the same
    benchmarks/gpu_hour.sh --dry-run         # prints the plan: limit in seconds, name, command

Every step has a time limit of its own. What it prints as JSON is kept, and why it failed; what goes wrong in one step
does not stop the next. The file is written after each, so that nothing is lost with the machine.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch.record import environment
from perception.files import write_text

GRACE_S = 10
"""From SIGTERM to SIGKILL."""
_LATE = (124, 137)
"""What `timeout` ends with, by SIGTERM and by SIGKILL."""
_TAIL = 5
"""Last lines of its output that a failed step is recorded with."""
_LEARNER = "python -m benchmarks.learner --device cuda --shape 3b --json"
_ROLLOUT = "python -m benchmarks.rollout --device cuda --dtype bfloat16 --policy data/models/random-3b --json"


@dataclass(frozen=True, slots=True)
class Step:
    name: str
    limit_s: int
    command: str

    @property
    def words(self) -> list[str]:
        return [sys.executable if word == "python" else word for word in shlex.split(self.command)]


PLAN = (  # what finds the most comes first; `one step by stage` also writes the model that `rollout` takes
    Step("doctor", 60, "python -m launch.doctor"),
    Step("gpu tests", 500, "make test-gpu CUDA=1"),
    Step("one step by stage", 420, "python -m benchmarks.step --recipe shape_3b --steps 5 --json"),
    Step("weight sync", 240, "python -m benchmarks.sync --repeats 5 --json recipe=shape_3b"),
    Step("learner and padded rows, varlen tower", 300, f"{_LEARNER} --rival padded_varlen --steps 4"),
    Step("learner and TRL", 300, f"{_LEARNER} --rival trl --steps 2 --warm-up 1"),
    Step("learner and padded rows", 240, f"{_LEARNER} --rival padded --steps 2 --warm-up 1"),
    Step("rollout and bare vLLM", 240, f"{_ROLLOUT} --side 840 --prompts 16 --tokens 384 --repeats 2"),
)


@dataclass(frozen=True, slots=True)
class Taken:
    name: str
    seconds: float
    error: str | None
    """None: it succeeded."""
    results: list[dict[str, Any]] = field(default_factory=list)
    """The JSON lines it printed."""

    def __str__(self) -> str:
        ratios = [f"ratio {one['ratio']:.3g}" for one in self.results if one.get("ratio")]
        return f"{self.name:40} {self.seconds:6.0f} s  {self.error or ', '.join(ratios) or 'done'}"


def take(step: Step) -> Taken:
    """Run a step to its end, or end it with all its processes at its limit."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        limit = ["timeout", f"--kill-after={GRACE_S}", str(step.limit_s)]
        status = subprocess.run([*limit, *step.words], stdout=output, stderr=subprocess.STDOUT).returncode
        output.seek(0)
        lines = [line.strip() for line in output if line.strip()]
    error = None
    if status:
        how = f"over {step.limit_s} s" if status in _LATE else f"exit {status}"
        error = f"{how}: {' | '.join(lines[-_TAIL:]) or 'it said nothing'}"
    return Taken(step.name, round(time.monotonic() - began, 1), error, [*_json(lines)])


def _json(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("{"):
            with suppress(ValueError):
                yield json.loads(line)


def run(plan: Sequence[Step], output: Path) -> list[Taken]:
    """Take every step, and write what there is after each."""
    taken: list[Taken] = []
    for step in plan:
        print(f"{step.name} ... (at most {step.limit_s} s)", file=sys.stderr, flush=True)
        taken.append(take(step))
        print(taken[-1], flush=True)
        content = {"environment": environment.describe(), "steps": [asdict(one) for one in taken]}
        write_text(output, json.dumps(content, indent=1) + "\n")
    return taken


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("output", type=Path, nargs="?", help="the JSON file to write")
    made.add_argument("--dry-run", action="store_true", help="only print the plan")
    arguments = made.parse_args()
    if arguments.dry_run:
        for step in PLAN:
            print(f"{step.limit_s:4}  {step.name:40}  {shlex.join(step.words)}")
    elif arguments.output is None:
        made.error("name the JSON file to write, or give --dry-run")
    else:
        sys.exit(any(one.error for one in run(PLAN, arguments.output)))


if __name__ == "__main__":
    main()
