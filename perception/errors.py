"""What is wrong with the user's data, as one line."""

from __future__ import annotations


class DataError(ValueError):
    """Input that cannot be used. The message names the file, line or id, says what is wrong and how to mend it."""
