"""The one exception a user is meant to read, and how it is read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from perception.errors import DataError


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, and how to mend it."""


@contextmanager
def told() -> Iterator[None]:
    """Within this, a UserError or DataError ends the program with its line on stderr and status 2, no traceback."""
    try:
        yield
    except (UserError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
