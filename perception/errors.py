"""Errors with a message of one line: what is wrong, where, and how to mend it."""


class UserError(Exception):
    """Settings, files or a machine that cannot be used. The program ends with status 2."""


class ActorError(RuntimeError):
    """The actors cannot go on. The message names the actor, what it was doing, and why."""


class DataError(ValueError):
    """Input that cannot be used. The message names the file, line or id."""
