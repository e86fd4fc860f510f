r"""Dr. Seg's format rewards and its reading of an answer, exactly as published (eVI-group-SCU/Dr-Seg, `dr_seg.py`).

Pure functions of the completion text, in linear time: the published lazy patterns rescan the text once per unclosed
tag, so tags are found by `str.find` with the same result. The equivalent pattern stands beside each function. Memory is
bounded by `LONGEST`; nothing else differs from the published code but the values of NaN (`published_objects`).
"""

from __future__ import annotations

import gc
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_OBJECTS = 120
"""A longer list is cut here, in the truth as in the answer."""
LONGEST = 1_000_000
"""Characters. A longer answer is not read, nor are sentences beyond: each would become some 30 times its size in Python
objects. The published limit of 3,000 tokens is below a fiftieth of it."""

_CLOSE_THEN_ANSWER = re.compile(r"</think>\s*<answer>")
_LOOK_START = re.compile(r"<look>\s*\S")
_SENTENCE_END = re.compile(r"[.。!?？！…]+")
_WHITE = re.compile(r"\s+")
_TRIMMED = " \"'“”‘’[](){}，,;:、"
_PLACEHOLDERS = tuple(
    (words[0], re.compile(r"\b" + r"[\s\W]*".join(words) + r"\b", re.IGNORECASE))
    for words in (("your", "reasoning", "text"), ("your", "visual", "focus"), ("more", "reasoning", "text"))
)
"""With the first word, by which most texts are ruled out in a fraction of the time."""


def section(text: str, tag: str) -> str | None:
    r"""Body of the first `<tag>`, stripped; None when it is not there or not closed. `<tag>\s*(.*?)\s*</tag>`"""
    start = text.find(f"<{tag}>")
    end = text.find(f"</{tag}>", start + len(tag) + 2) if start >= 0 else -1
    return text[start + len(tag) + 2 : end].strip() if end >= 0 else None


def think_format(text: str) -> float:
    r"""1 iff the text is a think block and then an answer. `fullmatch <think>.*?</think>\s*<answer>.*?</answer>`"""
    opening, closing = "<think>", "</answer>"
    if not (text.startswith(opening) and text.endswith(closing)):
        return 0.0
    return float(_CLOSE_THEN_ANSWER.search(text, len(opening), len(text) - len(closing)) is not None)


def answer_format(text: str) -> float:
    """Mean over the answered items of [`bbox_2d` is a list of 4] + [`point_2d` is a list of 2]: 0..2.

    What was summed before a malformed item stands; an empty list is worth 0.
    """
    data = _load_answer(text)
    total = 0.0
    try:
        for item in data:
            box_ok = "bbox_2d" in item and _is_list(item["bbox_2d"], 4)
            point_ok = "point_2d" in item and _is_list(item["point_2d"], 2)
            total += (float(box_ok) + float(point_ok)) / len(data)
    except TypeError:
        return total
    return total


def look(text: str) -> float:
    """1 iff the first think body or the first answer body holds a `<look>` block that is not empty."""
    return float(any(_has_look(section(text, tag) or "") for tag in ("think", "answer")))


def non_repeat(text: str) -> float:
    """0 if the text copies a placeholder of the prompt or repeats sentences at least twice in all, else 1."""
    text = text[:LONGEST]
    lower = text.lower()
    if any(first in lower and pattern.search(text) for first, pattern in _PLACEHOLDERS):
        return 0.0
    sentences = [normal for part in _SENTENCE_END.split(text) if (normal := _normal(part))]
    return float(len(sentences) - len(set(sentences)) < 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedObjects:
    """Predictions as the published accuracy reward sees them, in the answer's own frame."""

    count: int
    boxes: np.ndarray
    """(count, 4) float64; all NaN (which matches nothing) where the published arrays could not be built."""
    points: np.ndarray
    """(count, 2) float64, likewise."""


def published_objects(text: str) -> PublishedObjects:
    """The objects the published accuracy reward scores.

    Differs from `answers.parse`: one item without `bbox_2d` or `point_2d` empties the list, and one that is no pair of
    numeric lists leaves only the count. A null becomes NaN, as published; it matches nothing, where the published
    metric would turn NaN.
    """
    data = _load_answer(text)
    try:
        pairs = [(item["bbox_2d"], item["point_2d"]) for item in data] if isinstance(data, list) else []
    except (TypeError, KeyError):
        pairs = []
    pairs = pairs[:MAX_OBJECTS]
    boxes, points = _numeric([box for box, _ in pairs], 4), _numeric([point for _, point in pairs], 2)
    if boxes is None or points is None:
        boxes, points = np.full((len(pairs), 4), np.nan), np.full((len(pairs), 2), np.nan)
    return PublishedObjects(count=len(pairs), boxes=boxes, points=points)


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


def _load_answer(text: str) -> Any:
    """JSON inside the answer; None when there is none."""
    try:
        return load(section(text, "answer") or "")
    except ValueError:
        return None


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


def _has_look(body: str) -> bool:
    r"""`<look>\s*\S[\s\S]*?</look>`: only the first opening and the last closing tag can decide it."""
    start = _LOOK_START.search(body)
    return start is not None and body.rfind("</look>") >= start.end()


def _normal(sentence: str) -> str:
    return _WHITE.sub(" ", sentence.strip().strip(_TRIMMED)).lower()


def _numeric(rows: list[Any], width: int) -> np.ndarray | None:
    """(N, width) float64, or None."""
    try:
        array = np.array(rows, dtype=np.float64) if rows else np.empty((0, width))
    except (ValueError, TypeError, OverflowError):
        return None
    return array if array.shape == (len(rows), width) else None
