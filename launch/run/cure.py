"""Cure of a run that does not fit in memory: the nearest settings with which the memory model says that it would."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations
from typing import Any

from launch.run import memory
from perception.config import Config


def cure(config: Config, machine: memory.Machine, possible: Callable[[Config], bool]) -> str:
    """What to change, in words: the cheapest of `_smaller` that is possible and fits."""
    sizes = cache(lambda lora: memory.measure(config.model, replace(config.learner, lora=lora)))
    for words, other in _smaller(config):
        if possible(other) and not any(room.short for room in memory.rooms(sizes(other.learner.lora), other, machine)):
            return f"{words} would fit"
    return "no one or two settings would make it fit: take a smaller model or a larger machine"


def _smaller(config: Config) -> Iterator[tuple[str, Config]]:
    """What would take less memory, one setting alone and then two, cheapest first: as words, and the settings so."""
    learner, rollout = config.learner, config.rollout
    changes = {
        "learner.checkpointing": "on",
        "rollout.kv_cache_mb": max(rollout.kv_cache_mb, 4096),
        "learner.micro_tokens": learner.micro_tokens // 2,
        "learner.zero_stage": min(3, learner.zero_stage + 1) if learner.ranks > 1 else learner.zero_stage,
        "learner.offload_optimizer": True,
        "learner.lora.rank": 64,
        "learner.ranks": 2 * learner.ranks,
    }
    for chosen in (*combinations(changes, 1), *combinations(changes, 2)):
        other = config
        for key in chosen:
            other = _with(other, key, changes[key])
        yield " ".join(f"{key}={str(changes[key]).lower()}" for key in chosen), other


def _with(settings: Any, key: str, value: object) -> Any:
    name, _, rest = key.partition(".")
    return replace(settings, **{name: _with(getattr(settings, name), rest, value) if rest else value})
