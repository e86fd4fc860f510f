"""Names of a sweep's combinations: short, unique, and words that a command line takes as they stand."""

import re
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from itertools import count

LONGEST = 60


def combination_name(swept: Mapping[str, str], taken: Container[str]) -> str:
    """As `lr-2e-05_seed-1` of {"learner.lr": "2e-05", "run.seed": "1"}; other than those that are taken."""
    short = short_keys(swept)
    whole = "_".join(f"{short[key]}-{_plain(value)}" for key, value in swept.items())[:LONGEST]
    base = whole.strip("-._") or "combination"
    return next(one for number in count(1) if (one := base if number == 1 else f"{base}-{number}") not in taken)


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Each key's last parts, as many as tell it from the others."""
    parts = {key: re.findall(r"\w+", key, re.ASCII) for key in keys}
    short = {}
    for key, own in parts.items():
        others = [other for one, other in parts.items() if one != key]
        enough = (n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others))
        short[key] = ".".join(own[-next(enough, len(own)) :])
    return short


def _plain(value: str) -> str:
    """A value's letters, digits, dots, underscores and hyphens; four digits of a number that has many."""
    with suppress(ValueError):
        value = f"{float(value):.4g}" if len(value) > 8 else value
    return re.sub(r"[^A-Za-z0-9._-]+", "-", value.strip("\"'[]{}()/ "))
