"""The one exception a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, and how to mend it.

    `launch` prints it on stderr and exits 2, without a traceback.
    """
