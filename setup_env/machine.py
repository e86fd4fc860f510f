"""What a machine must have. Standard library only: `setup_env/install.sh` begins with it.

python3.11 -m setup_env.machine cuda       # exit 2 and a line for each thing that is missing
"""

import ctypes
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_CUDA = 13000
"""What the pinned wheels are built for, as cuDriverGetVersion counts: 1000 * major + 10 * minor."""
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


class Requirement(NamedTuple):
    subject: str
    found: str | None
    cure: str
    """What is wrong and how to mend it, where nothing fit was found."""


def requirements(kind: str) -> Iterator[Requirement]:
    """What the set `cpu` or `cuda` needs."""
    if kind == "cpu":
        numa = "libnuma.so.1"
        cure = f"vLLM on the CPU needs the system library {numa} (Debian, Ubuntu: apt-get install libnuma1)"
        yield Requirement("libnuma", numa if _library(numa) else None, cure)
        return
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # in Triton's own order
    cure = "Triton compiles at run time: gcc or clang must be on the PATH (Debian, Ubuntu: apt-get install g++)"
    yield Requirement("compiler", compiler and shutil.which(compiler), cure)
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    cure = f"Triton compiles against {header}, which is missing (Debian, Ubuntu: apt-get install python3.11-dev)"
    yield Requirement("headers", str(header) if header.is_file() else None, cure)
    if cuda := _cuda_of_driver():  # none is none of an environment's business: an image, a login node
        driver = f"{_driver()}, for CUDA {cuda // 1000}.{cuda % 1000 // 10}"
        cure = f"NVIDIA driver {driver}: the CUDA 13 wheels need 580 or newer; install it on the host"
        yield Requirement("driver", driver if cuda >= _CUDA else None, cure)


def _library(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _cuda_of_driver() -> int:
    """The newest CUDA that the driver runs, a compatibility package counted in; 0 without a driver."""
    driver, version = _library("libcuda.so.1"), ctypes.c_int()
    if driver is not None:
        driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value


def _driver() -> str:
    """The kernel driver's version, such as 580.65.06."""
    text = _DRIVER_FILE.read_text(encoding="utf-8") if _DRIVER_FILE.is_file() else ""
    found = re.search(r"\b\d{3,}\.\d[\d.]*", text)
    return found[0] if found else "of unknown version"


def main(kind: str) -> int:
    missing = [one.cure for one in requirements(kind) if one.found is None]
    for cure in missing:
        print(f"make setup: {cure}", file=sys.stderr)
    return 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
