"""Grammar of completions: tagged sections, JSON, and numbers in it. Safe on hostile text: time is linear, memory is
bounded, and nothing is raised that a docstring does not name."""

import gc
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

MAX_OBJECTS = 4096
"""A longer answer is cut here; a sample with more objects is refused."""
LONGEST = 1_000_000
"""Characters. A longer answer is not read, nor are sentences beyond: each would become some 30 times its size in Python
objects. The published limit of 3,000 tokens is below a fiftieth of it."""
_HALF = re.compile("[\ud800-\udfff]")
_ESCAPE = re.compile(r"(\\u(?i:d[89ab][\da-f]{2})\\u(?i:d[c-f][\da-f]{2})|\\[^u])|\\u(?i:d[89a-f][\da-f]{2})")
"""A whole surrogate pair or any other escape (group 1), or half a pair."""
_TRAILING_COMMA = re.compile(r",(?=\s*\])")
_LARGEST = 1e6  # a coordinate beyond this is no place in any image


def clean(text: str) -> str:
    """The text without lone halves of surrogate pairs, which no file and no tokenizer takes: U+FFFD in their place.

    All text that a model, a data set or the settings bring in goes through this.
    """
    return _HALF.sub("\ufffd", text)


def clean_json(text: str) -> str:
    """JSON that spells no half of a surrogate pair, as a character or as an escape."""
    return _ESCAPE.sub(lambda found: found[1] or r"\ufffd", clean(text))


def section(text: str, tag: str) -> str | None:
    r"""Body of the first `<tag>`, stripped; None when it is not there or not closed.

    Equal to the published lazy pattern `<tag>\s*(.*?)\s*</tag>`, which rescans the text once per unclosed tag.
    """
    start = text.find(f"<{tag}>")
    end = text.find(f"</{tag}>", start + len(tag) + 2) if start >= 0 else -1
    return text[start + len(tag) + 2 : end].strip() if end >= 0 else None


def unfenced(text: str) -> str:
    """The text without the marks of code fences, of JSON or of nothing."""
    return text.replace("```json", "").replace("```", "")


def braces(text: str) -> str | None:
    """The first `{...}` that is not empty and holds no `}`, or None. Equal to the published `{[^}]+}`, which rescans
    the text once per brace that is never closed."""
    found = re.search(r"\{[^}]", text)
    end = text.find("}", found.end()) if found else -1
    return text[found.start() : end + 1] if found and end >= 0 else None


def lists(text: str, tag: str) -> Iterator[list[Any]]:
    """Lists of whole numbers that are not negative, as they stand in `<tag>[...]</tag>`; what is none is passed over. A
    comma before a closing bracket is allowed."""
    for found in re.finditer(rf"<{tag}>\s*(\[[\d\s,\[\]]*)</{tag}>", text, re.ASCII):
        with suppress(ValueError):
            yield load(_TRAILING_COMMA.sub("", found[1]))


def load(body: str) -> Any:
    """Any JSON value, its texts clean. Raises ValueError for what is none, too deeply nested or beyond `LONGEST`."""
    if len(body) > LONGEST:
        raise ValueError(f"longer than {LONGEST:,} characters")
    collecting = gc.isenabled()
    gc.disable()  # JSON holds no cycles, and looking for some after every 700 lists takes ten times as long as reading
    try:
        return json.loads(clean_json(body))
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
