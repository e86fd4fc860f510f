r"""Components about the form of a completion, exactly as published (eVI-group-SCU/Dr-Seg, `dr_seg.py`; VisionReasoner).

Pure functions of the text, in linear time: the published lazy patterns rescan the text once per unclosed tag, so tags
are found by `str.find` with the same result. The equivalent pattern stands beside each function.
"""

import re
from typing import Any

from perception.grammar import LONGEST, load, section
from reward_workers.components import Case, component

_CLOSE_THEN_ANSWER = re.compile(r"</think>\s*<answer>")
_LOOK_START = re.compile(r"<look>\s*\S")
_SENTENCE_END = re.compile(r"[.。!?！？…]+")
_WHITE = re.compile(r"\s+")
_TRIMMED = " \"'“”‘’[](){}，,;:、"
_PLACEHOLDERS = tuple(
    (words[0], re.compile(r"\b" + r"[\s\W]*".join(words) + r"\b", re.IGNORECASE))
    for words in (("your", "reasoning", "text"), ("your", "visual", "focus"), ("more", "reasoning", "text"))
)
"""Phrases of the published prompt, each with its first word: looking for that alone rules out most texts quickly."""


@component()
def parsed(case: Case) -> float:
    """1 iff the completion holds an answer in the task's grammar."""
    return float(case.answered)


@component()
def think_format(case: Case) -> float:
    r"""1 iff the text is a think block and then an answer. `fullmatch <think>.*?</think>\s*<answer>.*?</answer>`"""
    text, opening, closing = case.text, "<think>", "</answer>"
    if not (text.startswith(opening) and text.endswith(closing)):
        return 0.0
    return float(_CLOSE_THEN_ANSWER.search(text, len(opening), len(text) - len(closing)) is not None)


@component()
def answer_format(case: Case) -> float:
    """Mean over the answered items of [`bbox_2d` is a list of 4] + [`point_2d` is a list of 2]: 0..2.

    What was summed before a malformed item stands; an empty list is worth 0.
    """
    data = json_answer(case.text)
    total = 0.0
    try:
        for item in data:
            fits = [name in item and _is_list(item[name], size) for name, size in (("bbox_2d", 4), ("point_2d", 2))]
            total += sum(fits) / len(data)
    except TypeError:
        return total
    return total


@component()
def look(case: Case) -> float:
    """1 iff the first think body or the first answer body holds a `<look>` block that is not empty."""
    bodies = (section(case.text, tag) or "" for tag in ("think", "answer"))
    # As `<look>\s*\S[\s\S]*?</look>`: only the first opening and the last closing tag can decide it.
    return float(any((found := _LOOK_START.search(body)) and body.rfind("</look>") >= found.end() for body in bodies))


@component()
def non_repeat(case: Case) -> float:
    """Dr. Seg's: 0 if the text copies a placeholder of the prompt or repeats two sentences in all, else 1."""
    text = case.text[:LONGEST]
    lower = text.lower()
    if any(first in lower and pattern.search(text) for first, pattern in _PLACEHOLDERS):
        return 0.0
    trimmed = (part.strip().strip(_TRIMMED) for part in _SENTENCE_END.split(text))
    return _varied([_WHITE.sub(" ", sentence).lower() for sentence in trimmed if sentence])


@component()
def non_repeat_plain(case: Case) -> float:
    """VisionReasoner's: 0 if sentences, split at '.', repeat at least twice in all, else 1."""
    return _varied([sentence for part in case.text[:LONGEST].split(".") if (sentence := part.strip())])


def json_answer(text: str) -> Any:
    """JSON inside the answer; None when there is none."""
    return json_or_none(section(text, "answer"))


def json_or_none(body: str | None) -> Any:
    try:
        return load(body or "")
    except ValueError:
        return None


def _varied(sentences: list[str]) -> float:
    return float(len(sentences) - len(set(sentences)) < 2)


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length
