"""Presets of rewards as they stand in conf/reward, measured without a run."""

from __future__ import annotations

from functools import cache

import yaml

from launch.run.config import CONF
from perception.config import weights
from reward_workers.components import Case, Component, terms


@cache
def preset(name: str) -> dict[str, tuple[float, Component]]:
    """Weight and component of each plain term, by name."""
    chosen = yaml.safe_load((CONF / "reward" / f"{name}.yaml").read_text())["components"]
    found = terms(chosen, name)
    return {term: (weight, found[term]) for term, weight in weights(chosen).items()}


def reward(name: str, case: Case) -> float:
    """The weighted sum of a preset's plain terms."""
    return sum(weight * term(case) for weight, term in preset(name).values())
