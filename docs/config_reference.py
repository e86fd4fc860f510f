"""Writes docs/config.md, every setting of `perception/config/`: `python docs/config_reference.py`, or `make docs`."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from itertools import groupby
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from annotated_types import Ge, Gt, Le  # noqa: E402

from perception import config  # noqa: E402

PAGE = ROOT / "docs" / "config.md"
HEAD = """# Settings

Made by `make docs` from `perception/config/`. Any of them can be given on the command line by its dotted name
(`learner.lr=2e-5`); groups and recipes under `conf/` give several at once. What has no default must be given.
"""
NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "anything", NoneType: "null"}
BOUNDS = {Gt: ("gt", ">"), Ge: ("ge", ">="), Le: ("le", "<=")}


def sentences() -> dict[tuple[str, str], str]:
    """By class and field: what stands under the field, or under the fields whose last one it is."""
    found = {}
    modules = sorted(Path(config.__file__).parent.glob("*.py"))
    for kind in (kind for one in modules for kind in ast.parse(one.read_text(encoding="utf-8")).body):
        waiting = []
        for node in kind.body if isinstance(kind, ast.ClassDef) else ():
            if isinstance(node, ast.AnnAssign):
                waiting.append((kind.name, ast.unparse(node.target)))
            elif isinstance(node, ast.Expr):
                found |= dict.fromkeys(waiting, " ".join(ast.literal_eval(node.value).split()))
                waiting = []
    return found


def settings(kind: type = config.Config, section: str = "") -> Iterator[tuple[str, type, Field[Any]]]:
    """(section, its dataclass, field) of everything that can be set; a section's own fields before those below it."""
    yield from ((section, kind, one) for one in fields(kind))
    for one in fields(kind):
        hint = get_type_hints(kind)[one.name]
        if inner := next((part for part in (hint, *get_args(hint)) if is_dataclass(part)), None):
            yield from settings(inner, f"{section}{one.name}.{'' if is_dataclass(hint) else 'NAME.'}")


def described(hint: Any) -> str:
    """A type in words, with its bounds or choices."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = [(*BOUNDS[type(bound)], bound) for bound in inside[1:]]
        return f"{described(inside[0])} " + ", ".join(
            f"{sign} {getattr(bound, name):g}" for name, sign, bound in limits
        )
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin in (Union, UnionType):
        return " or ".join(map(described, inside))
    if origin is tuple:
        return f"list of {described(inside[0])}" if inside[-1] is Ellipsis else f"{len(inside)} {described(inside[0])}s"
    if origin is dict:
        return f"mapping to {described(inside[1])}"
    return NAMES.get(hint, "section")


def default(one: Field[Any]) -> str:
    if one.default is MISSING:
        return "required" if one.default_factory is MISSING else "`{}`"
    return f"`{one.default if isinstance(one.default, str) else json.dumps(one.default)}`"


def rows() -> Iterator[tuple[str, str]]:
    """(section, row of its table); fields that share a sentence share a row."""
    known = sentences()
    for (section, kind, text), shared in groupby(
        settings(), lambda it: (it[0], it[1], known[it[1].__name__, it[2].name])
    ):
        hints = get_type_hints(kind, include_extras=True)
        cells = []
        for *_, one in shared:
            what = described(hints[one.name])
            cells.append((f"`{section}{one.name}`", what, "" if what == "section" else default(one)))
        yield (
            section,
            f"| {' | '.join(map('<br>'.join, zip(*cells, strict=True)))} | {text.replace('|', chr(92) + '|')} |",
        )


def reference() -> str:
    """The whole page: a table per section."""
    lines = [HEAD.rstrip()]
    for section, table in groupby(rows(), lambda it: it[0]):
        lines += ["", f"## {section.rstrip('.') or 'Sections'}", "", "| key | value | default | |", "|---|---|---|---|"]
        lines += [row for _, row in table]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
