"""Guards the published rules about a completion's form to the letter, and the published reading of its objects."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from perception.grammar import section
from reward_workers.components import COMPONENTS
from reward_workers.components.dr_seg import PublishedObjects, published_objects
from tests.builders import case

GOOD = (
    '<think>a <look>red edge</look> b</think>\n<answer>[{"bbox_2d": [1, 2, 3.5, 4], "point_2d": [2, 3], "label": "cat"}'
    ', {"bbox_2d": [5, 6, 7, 8], "point_2d": [6, 7]}]</answer>'
)


def answer(body: str) -> str:
    return f"<think>t</think><answer>{body}</answer>"


def item(box: object = (1, 2, 3, 4), point: object = (2, 3)) -> dict[str, Any]:
    return {"bbox_2d": box, "point_2d": point}


def worth(name: str, text: str) -> float:
    return COMPONENTS[name].measure(case(text))


def published(text: str) -> PublishedObjects:
    return published_objects(case(text))


# The published patterns themselves, as the reference; quadratic on hostile text, hence not used by the product.
THINK = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
LOOK = re.compile(r"<look>\s*\S[\s\S]*?</look>", re.DOTALL)


def reference_section(text: str, tag: str) -> str | None:
    found = re.search(rf"<{tag}>\s*(.*?)\s*</{tag}>", text, re.DOTALL)
    return found.group(1) if found else None


tags = ["<think>", "</think>", "<answer>", "</answer>", "<look>", "</look>"]
soup = st.lists(st.sampled_from([*tags, *tags, " ", "\n", "\u2003", "\x1c", "a", "<", "[]", "<loo", "k>"]), max_size=14)


@settings(max_examples=400)
@given(soup.map("".join))
@example("<think></think><answer></answer>")
@example("<think></think>x</think> <answer></answer></answer>")
@example("<think></answer>")
@example("<think><look></look> </look></think>")
def test_tags_are_found_as_the_published_patterns_find_them(text: str) -> None:
    assert worth("think_format", text) == float(THINK.fullmatch(text) is not None)
    for tag in ("think", "answer"):
        assert section(text, tag) == reference_section(text, tag)
    bodies = [reference_section(text, tag) or "" for tag in ("think", "answer")]
    assert worth("look", text) == float(any(LOOK.search(body) for body in bodies))


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (json.dumps([item()]), 2.0),
        (json.dumps([item(), {}]), 1.0),
        (json.dumps([item(point=[1, 2, 3]), item()]), 1.5),
        (json.dumps([item(), item(), 5, item()]), 1.0),  # 2/4 + 2/4, then the number stops the reading
        (json.dumps([item(), "bbox_2d"]), 1.0),
        (json.dumps(item()), 0.0),
        ('[{"bbox_2d": ["a", null, [], 4]}]', 1.0),  # only list and length are looked at
        ("[]", 0.0),
        ("17", 0.0),
        ("oops", 0.0),
    ],
)
def test_answer_format(body: str, value: float) -> None:
    assert worth("answer_format", answer(body)) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("One. Two. Three.", 1.0),
        ("Red. red! Blue.", 1.0),  # one repeat is allowed
        ("Red. red! “RED”?", 0.0),  # two are not
        ("A. a. B. b.", 0.0),
        ("a  b。A b！ (a\tb)…", 0.0),
        ("... !!! ???", 1.0),
        ("I put [your reasoning text] here", 0.0),
        ("MORE -- reasoning\n(text)", 0.0),
        ("yourvisualfocus", 0.0),  # between the words there may be nothing
        ("your_visual_focus", 1.0),  # but not a word character
        ("your visual focused", 1.0),
        ("yours visual focus", 1.0),
        (GOOD, 1.0),
        ("", 1.0),
    ],
)
def test_non_repeat(text: str, value: float) -> None:
    assert worth("non_repeat", text) == value


def test_published_objects_are_all_or_nothing() -> None:
    two = published(answer(json.dumps([item(), item(box=[5, 6, 7, 8])])))
    assert two.boxes.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert two.points.tolist() == [[2, 3], [2, 3]]
    assert len(published(answer(json.dumps([item(), {"bbox_2d": [1, 2, 3, 4]}]))).boxes) == 0
    assert len(published(answer(json.dumps({"bbox_2d": [1, 2, 3, 4]}))).boxes) == 0
    null = published(answer(json.dumps([item(), item(point=[None, 1])])))
    np.testing.assert_equal(null.points, [[2, 3], [np.nan, 1]])
    for wrong in (item(box=[1, 2, 3]), item(point="x"), item(box=[[1, 2], [3, 4]]), item(point=[10**400, 1])):
        unusable = published(answer(json.dumps([item(), wrong])))
        assert unusable.boxes.shape == (2, 4) and unusable.points.shape == (2, 2)
        assert np.isnan(unusable.boxes).all()
        assert np.isnan(unusable.points).all()
