"""What every benchmark shares: its command line and the one JSON line it prints."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping
from typing import Any

from launch.record.environment import versions


def parser(doc: str | None) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--json", action="store_true", help="one JSON line and no other output")
    return found


def options(doc: str | None, overrides: bool = False, **named: tuple[Any, str]) -> argparse.Namespace:
    """`--name value` from the command line, by name (default, help), for a benchmark that only ever prints JSON.

    With `overrides` what stands beside the options is taken as for launch.train.
    """
    made = parser(doc)
    for name, (default, text) in named.items():
        made.add_argument(f"--{name}", type=type(default), default=default, help=text)
    if overrides:
        made.add_argument("overrides", nargs="*", help="as for launch.train")
    arguments = made.parse_args()
    del arguments.json
    return arguments


def print_result(
    benchmark: str,
    ours: Mapping[str, Any],
    rival: Mapping[str, Any] | None,
    ratio: float | None,
    settings: Mapping[str, Any],
    **more: Any,
) -> None:
    """One line, keys sorted. `ratio` is ours / rival, or None where there is no rival."""
    host = {"cores": os.cpu_count(), "versions": {"python": platform.python_version(), **versions()}}
    line = {
        "benchmark": benchmark,
        "ours": ours,
        "rival": rival,
        "ratio": ratio,
        "settings": {**settings, **host},
        **more,
    }
    print(json.dumps(line, sort_keys=True), flush=True)
