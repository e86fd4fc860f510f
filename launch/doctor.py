"""`python -m launch.doctor`: is this machine fit to train? One line per finding, and how to mend what is not.

Reads package metadata and the machine's own figures; heavy libraries are not imported except for the one check that
`import torchvision` works, which runs in a process of its own. Exit status 1 if anything fails.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.record.environment import PACKAGES, gpus, version_of
from runtime.cluster import cpus

_ROOT = Path(__file__).resolve().parents[1]
_GIB = 1 << 30
_SHARED_MEMORY_GIB = 2.0  # Ray's object store and the weight buckets live there
_MEMORY_GIB = 8.0
_DISK_GIB = 5.0
_IMPORT_TIMEOUT_S = 120.0

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    verdict: Verdict
    subject: str
    detail: str


def examine() -> Iterator[Finding]:
    """Every finding, cheapest first."""
    yield _python()
    yield from _versions()
    yield _cpus()
    yield _gpus()
    yield _memory()
    yield _free("shared memory", Path("/dev/shm"), _SHARED_MEMORY_GIB, "start the container with --shm-size=4g")
    yield _free("disk", Path.cwd(), _DISK_GIB, "make room, or set run.output to another disk")
    yield _ray()
    yield _torchvision()


def tested_versions() -> dict[str, str]:
    """The set this program was tested with, as `constraints/` pins it: CUDA's where vLLM for CUDA is installed."""
    flavour = "cuda" if version_of("vllm") else "cpu"
    lines = (_ROOT / "constraints" / f"{flavour}.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.partition("#")[0].strip().partition("==") for line in lines)
    return {name: version for name, _, version in pins if version}


def _python() -> Finding:
    found = platform.python_version()
    if found.startswith("3.11."):
        return Finding("ok", "python", found)
    return Finding("fail", "python", f"{found}; this program is built for 3.11: run `make setup`")


def _versions() -> Iterator[Finding]:
    pins = tested_versions()
    for package in PACKAGES:
        found, tested = version_of(package), pins.get(package)
        if tested is None:
            continue  # belongs to the other set
        if found is None:
            yield Finding("fail", package, f"not installed (tested: {tested}): run `make setup`")
        elif found.partition("+")[0] != tested.partition("+")[0]:
            yield Finding("warn", package, f"{found}, but {tested} was tested: run `make setup` if something breaks")
        else:
            yield Finding("ok", package, found)


def _cpus() -> Finding:
    found = cpus()
    if found >= 2:
        return Finding("ok", "cpus", str(found))
    return Finding("warn", "cpus", f"{found}; the demo wants 2: lower placement.*_cpus and expect it to be slow")


def _gpus() -> Finding:
    found = gpus()
    if found:
        return Finding("ok", "gpus", "; ".join(found))
    if version_of("vllm"):
        return Finding("fail", "gpus", "none, but vLLM for CUDA is installed: mend the driver, or set up the CPU set")
    return Finding("ok", "gpus", "none: use placement=cpu")


def _memory() -> Finding:
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / _GIB
    if found >= _MEMORY_GIB:
        return Finding("ok", "memory", f"{found:.0f} GiB")
    return Finding("warn", "memory", f"{found:.1f} GiB; the demo wants {_MEMORY_GIB:.0f}: close other programs")


def _free(subject: str, path: Path, wanted: float, mend: str) -> Finding:
    if not path.is_dir():
        return Finding("fail", subject, f"{path} is missing: {mend}")
    free = shutil.disk_usage(path).free / _GIB
    if free >= wanted:
        return Finding("ok", subject, f"{free:.1f} GiB free in {path}")
    return Finding("warn", subject, f"{free:.1f} GiB free in {path}, {wanted:.0f} wanted: {mend}")


def _ray() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    return Finding("ok", "cluster", f"RAY_ADDRESS={address}" if address else "none: runs start a Ray of their own")


def _torchvision() -> Finding:
    """Beside CPU torch, torchvision's CUDA wheel only imports with the operators that `make setup` declares."""
    try:
        subprocess.run(
            [sys.executable, "-c", "import torchvision"],
            check=True, capture_output=True, text=True, timeout=_IMPORT_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Finding("warn", "torchvision", f"import took more than {_IMPORT_TIMEOUT_S:.0f} s: is the machine busy?")
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding("fail", "torchvision", f"does not import ({reason}): run `make setup`")
    return Finding("ok", "torchvision", "imports")


def main() -> int:
    table = Table.grid(padding=(0, 2))
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    worst = 0
    for finding in examine():
        verdict = Text(finding.verdict, style=colours[finding.verdict])
        table.add_row(verdict, Text(finding.subject), Text(finding.detail))
        worst = max(worst, int(finding.verdict == "fail"))
    Console().print(table)
    return worst


if __name__ == "__main__":
    sys.exit(main())
