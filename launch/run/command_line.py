"""From `key=value` words to typed settings; a user's mistake is one line that names the nearest valid key."""

import difflib
import os
import sys
import traceback
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import cache
from typing import Any, TypeVar, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError
from yaml import YAMLError

from perception.errors import ActorError, DataError, StoppedError, UserError
from perception.registry import PLUGINS

T = TypeVar("T")


@contextmanager
def told() -> Iterator[None]:
    """Within this, an error that is one line ends the program with it on stderr: status 2 where the user can mend it, 1
    where an actor failed, 3 where a rule ended the run, 130 where a signal did."""
    try:
        yield
    except (UserError, DataError, ActorError, StoppedError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except (KeyboardInterrupt, CancelledError):
        print("stopped: by a signal, at once", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if (place := users_own(error)) is None:
            raise
        print(f"error: {place}: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def users_own(error: Exception) -> str | None:
    """Where a user's own code raised it: a plugin's file and line, Optuna's sweeper, or the chat template; None: the
    program itself."""
    names = (*os.environ.get(PLUGINS, "").split(","), "hydra_plugins.hydra_optuna_sweeper")
    plugins = tuple(f"{name}." for name in names if name)
    place = "chat template" if type(error).__module__.startswith("jinja2") else None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if f"{frame.f_globals.get('__name__')}.".startswith(plugins):
            place = f"{frame.f_code.co_filename}:{line}"
        elif frame.f_code.co_filename == "<template>":
            place = f"chat template, line {line}"
    return place


def command(kind: type[T], run: Callable[[T], object]) -> None:
    """Run a small command with the settings its command line gives; exit 2 with one line when they do not fit."""
    with told():
        run(parse(kind, sys.argv[1:]))


def parse(kind: type[T], words: Sequence[str]) -> T:
    """The dataclass `kind` that `key=value` words make. Raises UserError."""
    try:
        plain = OmegaConf.to_container(OmegaConf.from_cli(list(words)), resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(one_line(error)) from error
    return typed(kind, plain)


def typed(kind: type[T], plain: Any) -> T:
    """`plain` as the dataclass `kind`. Raises UserError for the first unknown, missing or ill-typed key."""
    try:
        return _strict(kind).validate_python({"": plain})[""]  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"][1:] if part != "float")  # a union's branch, as pydantic says
        if first["type"] == "unexpected_keyword_argument":
            raise UserError(unknown(key, valid_keys(kind))) from error
        if first["type"] == "missing":
            raise UserError(f"no value for {key}: give {key}=...") from error
        raise UserError(f"{key}={first['input']!r}: {first['msg']}") from error


@cache
def _strict(kind: Any) -> TypeAdapter[dict[str, Any]]:
    """Checks settings of a dataclass under the key "": an outer type has nested stdlib dataclasses take the rules."""
    return TypeAdapter(dict[str, kind], config=ConfigDict(extra="forbid", coerce_numbers_to_str=True))


def valid_keys(kind: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a dataclass of settings; a mapping's own keys are the user's."""
    keys = []
    for name, hint in get_type_hints(kind).items() if is_dataclass(kind) else ():
        keys += [f"{prefix}{name}", *valid_keys(hint, f"{prefix}{name}.")]
    return keys


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in nested mappings; an empty mapping is a value."""
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        yield from leaves(value, f"{prefix}{key}.") if nested else [(prefix + key, value)]


def unknown(key: str, valid: Sequence[str]) -> str:
    return f"unknown key {key!r}; did you mean {difflib.get_close_matches(key, valid, n=1, cutoff=0.0)[0]!r}?"


def one_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:300]
