"""Is this machine fit to train, and is a model what a run will take it for?

    python -m launch.doctor
    python -m launch.doctor model.path=Qwen/Qwen2.5-VL-3B-Instruct
    python -m launch.doctor --deep model.path=assets/policy

Alone it says one line per finding about the machine, and how to mend what is not fit; exit status 1 if anything fails.
It reads package metadata and the machine's own figures; heavy libraries are not imported except for the one check that
`import torchvision` works, which runs in a process of its own.

With settings, those of `launch.train` (of the quickstart where no recipe is named), it shows a drawn example as the
model gets it; `--deep` also loads engine and learner and compares them (`launch.run.examine`). Exit status 2 where
something does not agree.
"""

import argparse
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.text import Text

from launch.record.environment import STACK, gpus, version_of
from runtime.cluster import cluster_address, cpus
from runtime.machine import memory
from setup_env.machine import requirements

_ROOT = Path(__file__).resolve().parents[1]
_GIB = 1 << 30
_MEMORY_GIB, _DISK_GIB, _SHARED_MEMORY_GIB = 8.0, 5.0, 2.0  # the last for Ray's object store and weight buckets
_IMPORT_TIMEOUT_S = 120.0
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    verdict: Literal["ok", "warn", "fail"]
    subject: str
    detail: str


def examine() -> Iterator[Finding]:
    """Every finding, cheapest first."""
    yield _python()
    yield from _versions()
    for one in requirements(_kind()):
        yield Finding("ok", one.subject, one.found) if one.found else Finding("fail", one.subject, one.cure)
    yield _enough("cpus", cpus(), 2, "", "lower placement.*_cpus and expect the demo to be slow")
    yield _gpus()
    yield _enough("memory", memory() / _GIB, _MEMORY_GIB, " GiB", "close other programs")
    yield _free("shared memory", Path("/dev/shm"), _SHARED_MEMORY_GIB, "start the container with --shm-size=4g")
    yield _free("disk", Path.cwd(), _DISK_GIB, "make room, or set run.output to another disk")
    address = cluster_address()
    yield Finding("ok", "cluster", f"RAY_ADDRESS={address}" if address else "none: runs start a Ray of their own")
    yield _torchvision()


def tested_versions() -> dict[str, str]:
    """The set this program was tested with, as `constraints/` pins it: CUDA's where vLLM for CUDA is installed."""
    lines = (_ROOT / "constraints" / f"{_kind()}.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.partition("#")[0].strip().partition("==") for line in lines)
    return {name: version for name, _, version in pins if version}


def _kind() -> str:
    """The set that is installed: `cpu` or `cuda`."""
    return "cuda" if version_of("vllm") else "cpu"


def _python() -> Finding:
    found = platform.python_version()
    cure = f"{found}; this program is built for 3.11: run `make setup`"
    return Finding("ok", "python", found) if found.startswith("3.11.") else Finding("fail", "python", cure)


def _versions() -> Iterator[Finding]:
    pins = tested_versions()
    for package in (name for name in STACK if name in pins):  # the others belong to the other set
        found, tested = version_of(package), pins[package]
        if found is None:
            yield Finding("fail", package, f"not installed (tested: {tested}): run `make setup`")
        elif found.partition("+")[0] != tested.partition("+")[0]:
            yield Finding("warn", package, f"{found}, but {tested} was tested: run `make setup` if something breaks")
        else:
            yield Finding("ok", package, found)


def _gpus() -> Finding:
    found = gpus()
    if not found and version_of("vllm"):
        return Finding("fail", "gpus", "none, but vLLM for CUDA is installed: mend the driver, or set up the CPU set")
    return Finding("ok", "gpus", "; ".join(found) or "none: use placement=cpu")


def _free(subject: str, path: Path, wanted: float, cure: str) -> Finding:
    if not path.is_dir():
        return Finding("fail", subject, f"{path} is missing: {cure}")
    return _enough(subject, shutil.disk_usage(path).free / _GIB, wanted, f" GiB free in {path}", cure)


def _enough(subject: str, found: float, wanted: float, unit: str, cure: str) -> Finding:
    amount = f"{round(found, 1):,}{unit}"
    if found >= wanted:
        return Finding("ok", subject, amount)
    return Finding("warn", subject, f"{amount}, {wanted:.0f} wanted: {cure}")


def _torchvision() -> Finding:
    """Beside CPU torch, torchvision's CUDA wheel only imports with the operators that `make setup` declares."""
    try:
        command = [sys.executable, "-c", "import torchvision"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_IMPORT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return Finding("warn", "torchvision", f"import took more than {_IMPORT_TIMEOUT_S:.0f} s: is the machine busy?")
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding("fail", "torchvision", f"does not import ({reason}): run `make setup`")
    return Finding("ok", "torchvision", "imports")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.doctor", description="Examine this machine, or a model.")
    parser.add_argument("settings", nargs="*", help="a model's, as for launch.train: model.path=...")
    parser.add_argument("--deep", action="store_true", help="also load engine and learner, and compare them")
    given = parser.parse_intermixed_args(words)
    if given.settings or given.deep:
        from launch.run.examine import examine as examine_model  # imports transformers: seconds

        return 0 if examine_model(given.settings, given.deep) else 2
    findings = list(examine())
    for one in findings:
        verdict = Text(f"{one.verdict:6}", style=_COLOURS[one.verdict])
        Console().print(verdict + f"{one.subject:19}{one.detail}", soft_wrap=True)
    return int(any(one.verdict == "fail" for one in findings))


if __name__ == "__main__":
    sys.exit(main())
