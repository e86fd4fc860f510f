"""The command line's edge: `name=value` arguments for the small commands, and a user's mistake told in one line."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from perception.errors import ActorError, DataError, UserError


@contextmanager
def told() -> Iterator[None]:
    """Within this, an error that is one line ends the program with it on stderr: status 2 where the user can mend it, 1
    where an actor failed."""
    try:
        yield
    except (UserError, DataError, ActorError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, ActorError) else 2)


def call(function: Callable[..., Any]) -> None:
    """Call `function` with the command line's `name=value` arguments; exit 2 with one line when they do not fit."""
    with told():
        function(**parse(function, sys.argv[1:]))


def parse(function: Callable[..., Any], arguments: Sequence[str]) -> dict[str, Any]:
    """Arguments by name, converted to the annotated types. Raises UserError."""
    hints = get_type_hints(function)
    known = list(inspect.signature(function).parameters)
    values: dict[str, Any] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals or name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown argument {argument!r}; did you mean {near}=...? (known: {', '.join(known)})")
        try:
            values[name] = TypeAdapter(hints[name]).validate_python(text)
        except ValidationError as error:
            raise UserError(f"{name}={text}: {error.errors()[0]['msg']}") from error
    required = [n for n, p in inspect.signature(function).parameters.items() if p.default is inspect.Parameter.empty]
    if missing := [name for name in required if name not in values]:
        raise UserError(f"missing argument {missing[0]}=...")
    return values
