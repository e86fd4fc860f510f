"""Guards the installation where a GPU is but no CUDA toolkit: what stands in the way is said first, and deepspeed's
source package asks for no `nvcc`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from launch import doctor
from runtime.cluster import ROOT

GPU = """
import torch
torch.version.cuda = "13.0"
torch.cuda._is_compiled = lambda: False  # so that no toolkit of this machine is found
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.is_bf16_supported = lambda: True
torch.cuda.nccl.version = lambda: (2, 29, 7)
torch.cuda.get_device_properties = lambda device: type("Properties", (), {"major": 9, "minor": 0})
"""


@pytest.mark.timeout(120)
def test_deepspeed_is_built_beside_a_gpu_without_nvcc(tmp_path: Path) -> None:
    """pip runs its setup.py in the environment that install.sh exports; in any other it dies."""
    (tmp_path / "sitecustomize.py").write_text(GPU)
    exports = [line for line in (ROOT / "setup_env/install.sh").read_text().splitlines() if line.startswith("export ")]
    bare = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH", "PYTHONPATH")}
    bare |= {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path), "DS_ACCELERATOR": "cuda"}

    def run(prelude: list[str], *arguments: str, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        shell = "\n".join([*prelude, 'exec "$@"'])
        command = ["bash", "-c", shell, "bash", sys.executable, *arguments]
        return subprocess.run(command, cwd=cwd, env=bare, capture_output=True, text=True, timeout=100)

    source = ("--no-deps", "--no-build-isolation", "--no-binary=:all:")
    got = run(exports, "-m", "pip", "download", *source, f"deepspeed=={doctor.tested_versions()['deepspeed']}")
    assert "metadata-generation-failed" not in got.stderr, got.stdout + got.stderr
    if got.returncode:
        pytest.skip(f"no package registry: {got.stderr.splitlines()[-1]}")
    (package,) = tmp_path.glob("deepspeed-*.tar.gz")
    with tarfile.open(package) as archive:
        archive.extractall(tmp_path, filter="data")
    unaided = run([], "setup.py", "--version", cwd=tmp_path / package.name.removesuffix(".tar.gz"))
    assert unaided.returncode != 0
    assert "MissingCUDAException" in unaided.stderr


def test_what_a_machine_lacks_is_said_before_anything_is_made(tmp_path: Path) -> None:
    for name in ("setup_env/install.sh", "setup_env/__init__.py", "setup_env/machine.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run(
        [bash, "setup_env/install.sh", sys.executable, "cuda"],
        cwd=tmp_path,
        env={"PATH": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("make setup: Triton compiles at run time: gcc or clang must be on the PATH")
    assert not (tmp_path / ".venv").exists()
