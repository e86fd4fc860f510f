"""Guards what is asked of a machine before anything is downloaded: a line for each thing it lacks, and exit 2."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import doctor
from setup_env import machine

KERNEL = "NVRM version: NVIDIA UNIX {} {}  Release Build  (dvs-builder@U22)\nGCC version:  gcc version 12.3.0\n"


def driver_library(cuda: int) -> Any:
    def get_version(pointer: Any) -> None:
        pointer._obj.value = cuda

    return SimpleNamespace(cuDriverGetVersion=get_version)


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with gcc, Python's headers and no NVIDIA driver; returns the folder that stands for its root."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gcc").touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda *names: str(tmp_path))
    monkeypatch.setattr(machine, "_library", lambda name: None)
    monkeypatch.setattr(machine, "_DRIVER_FILE", tmp_path / "version")
    return tmp_path


def test_a_fit_machine_needs_no_driver_to_make_the_cuda_set(fit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert machine.main("cuda") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("gone", "cure"),
    [
        (["bin/gcc"], ["g++"]),
        (["Python.h"], ["python3.11-dev"]),
        (["bin/gcc", "Python.h"], ["g++", "python3.11-dev"]),
    ],
    ids=str,
)
def test_each_missing_thing_is_a_line_with_its_cure(
    gone: list[str], cure: list[str], fit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in gone:
        (fit / name).unlink()
    assert machine.main("cuda") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(gone)
    assert all(line.endswith(f"apt-get install {package})") for line, package in zip(lines, cure, strict=True))


@pytest.mark.parametrize(("name", "found"), [("clang", 0), ("cc", 2)])
def test_the_compilers_are_those_that_triton_looks_for(name: str, found: int, fit: Path) -> None:
    (fit / "bin/gcc").rename(fit / "bin" / name)
    assert machine.main("cuda") == found


@pytest.mark.parametrize(("cc", "found"), [("{}/bin/gcc", 0), ("gcc", 0), ("/nowhere/gcc", 2)])
def test_a_compiler_named_by_cc_is_the_one(cc: str, found: int, fit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", cc.format(fit))
    assert machine.main("cuda") == found


@pytest.mark.parametrize(
    ("module", "version", "cuda", "said"),
    [
        ("x86_64 Kernel Module", "580.65.06", 13000, None),
        ("Open Kernel Module for x86_64", "590.11", 13010, None),
        ("x86_64 Kernel Module", "570.86.15", 13000, None),  # with NVIDIA's compatibility package
        ("x86_64 Kernel Module", "570.86.15", 12080, "driver 570.86.15, for CUDA 12.8:"),
        ("Open Kernel Module for x86_64", "535.247.01", 12020, "driver 535.247.01, for CUDA 12.2:"),
        (None, None, 12080, "driver of unknown version, for CUDA 12.8:"),  # WSL has no such file
    ],
)
def test_a_driver_that_is_too_old_is_named(
    module: str | None,
    version: str | None,
    cuda: int,
    said: str | None,
    fit: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(machine, "_library", lambda name: driver_library(cuda) if name == "libcuda.so.1" else None)
    if module:
        (fit / "version").write_text(KERNEL.format(module, version))
    assert machine.main("cuda") == (2 if said else 0)
    err = capsys.readouterr().err
    assert (said in err and "580 or newer" in err and err.count("\n") == 1) if said else not err


@pytest.mark.parametrize(("library", "status"), [("libnuma.so.1", 0), ("libc.so.6", 2)])
def test_the_cpu_set_needs_libnuma_only(
    library: str, status: int, fit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (fit / "bin/gcc").unlink()
    monkeypatch.setattr(machine, "_library", lambda name: object() if name == library else None)
    assert machine.main("cpu") == status
    assert capsys.readouterr().err.count("apt-get install libnuma1") == bool(status)


def test_doctor_says_the_same(fit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", {"vllm": "0.32.0"}.get)
    monkeypatch.setattr(doctor, "_torchvision", lambda: doctor.Finding("ok", "torchvision", "imports"))
    monkeypatch.setattr(doctor, "gpus", lambda: ["an invented GPU"])
    monkeypatch.setattr(machine, "_library", lambda name: driver_library(12080))
    (fit / "Python.h").unlink()
    found = {one.subject: one for one in doctor.examine()}
    assert (found["compiler"].verdict, found["compiler"].detail) == ("ok", str(fit / "bin/gcc"))
    assert [found[name].verdict for name in ("headers", "driver")] == ["fail", "fail"]
    assert "python3.11-dev" in found["headers"].detail


def test_doctor_compares_with_the_pinned_set(monkeypatch: pytest.MonkeyPatch) -> None:
    pins = doctor.tested_versions()
    assert pins["ray"] == "2.55.1" and pins["deepspeed"] == "0.19.8"
    installed = {"ray": "2.55.1", "wandb": "0.1", "torch": "2.13.0+cpu"}
    monkeypatch.setattr(doctor, "version_of", installed.get)
    found = {finding.subject: finding.verdict for finding in doctor._versions()}
    assert found["ray"] == "ok" and found["torch"] == "ok"
    assert found["wandb"] == "warn" and found["deepspeed"] == "fail"
