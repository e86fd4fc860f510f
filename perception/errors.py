"""Errors with a message of one line: what is wrong, where, and how to mend it."""


class UserError(Exception):
    """Settings, files or a machine that cannot be used. The program ends with status 2."""

    status = 2


class ActorError(RuntimeError):
    """The actors cannot go on. The message names the actor, what it was doing, and why."""

    status = 1


class StoppedError(Exception):
    """A rule of the user's ended the run before its last step. The program ends with status 3."""

    status = 3


class DataError(ValueError):
    """Input that cannot be used. The message names the file, line or id."""

    status = 2

    def __init__(self, message: str, reason: str = "record") -> None:
        """`reason`: the class by which skipped records are counted, as image, mask, box, point, text, truth, size."""
        super().__init__(message)
        self.reason = reason


class SkippedRecordError(DataError):
    """A record that cannot be used and, by `data.on_bad_record=skip`, is left out."""
