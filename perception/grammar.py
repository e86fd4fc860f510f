"""Grammar of completions: tagged sections, JSON, and numbers in it. Safe on hostile text: time is linear, memory is
bounded, and nothing is raised that a docstring does not name."""

import gc
import json
from typing import Any

MAX_OBJECTS = 4096
"""A longer answer is cut here; a sample with more objects is refused."""
LONGEST = 1_000_000
"""Characters. A longer answer is not read, nor are sentences beyond: each would become some 30 times its size in Python
objects. The published limit of 3,000 tokens is below a fiftieth of it."""
_LARGEST = 1e6  # a coordinate beyond this is no place in any image


def section(text: str, tag: str) -> str | None:
    r"""Body of the first `<tag>`, stripped; None when it is not there or not closed.

    Equal to the published lazy pattern `<tag>\s*(.*?)\s*</tag>`, which rescans the text once per unclosed tag.
    """
    start = text.find(f"<{tag}>")
    end = text.find(f"</{tag}>", start + len(tag) + 2) if start >= 0 else -1
    return text[start + len(tag) + 2 : end].strip() if end >= 0 else None


def load(body: str) -> Any:
    """Any JSON value. Raises ValueError for what is none, is longer than `LONGEST` or too deeply nested."""
    if len(body) > LONGEST:
        raise ValueError(f"longer than {LONGEST:,} characters")
    collecting = gc.isenabled()
    gc.disable()  # JSON holds no cycles, and looking for some after every 700 lists takes ten times as long as reading
    try:
        return json.loads(body)
    except RecursionError:
        raise ValueError("too deeply nested") from None
    finally:
        if collecting:
            gc.enable()


def numbers(value: Any, length: int) -> list[float] | None:
    """`length` finite numbers of sensible size, or None. Booleans are no numbers; NaN fails the comparison."""
    if not isinstance(value, list) or len(value) != length:
        return None
    if not all(type(number) in (int, float) and -_LARGEST <= number <= _LARGEST for number in value):
        return None
    return [float(number) for number in value]
