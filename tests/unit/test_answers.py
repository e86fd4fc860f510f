"""Guards the reading of completions: what an answer is, and the published format rules to the letter."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from perception import formats
from perception.answers import parse
from perception.types import Answer, AnswerObject, FailureKind

GOOD = (
    '<think>a <look>red edge</look> b</think>\n<answer>[{"bbox_2d": [1, 2, 3.5, 4], "point_2d": [2, 3], "label": "cat"}'
    ', {"bbox_2d": [5, 6, 7, 8], "point_2d": [6, 7]}]</answer>'
)


def answer(body: str) -> str:
    return f"<think>t</think><answer>{body}</answer>"


def item(box: object = (1, 2, 3, 4), point: object = (2, 3)) -> dict:
    return {"bbox_2d": box, "point_2d": point}


# ---------------------------------------------------------------- parse


def test_reads_boxes_points_labels_and_thinking() -> None:
    read = parse(GOOD, "segment")
    assert read == Answer(
        objects=(
            AnswerObject(box=(1, 2, 3.5, 4), point=(2, 3), label="cat"),
            AnswerObject(box=(5, 6, 7, 8), point=(6, 7)),
        ),
        think="a <look>red edge</look> b",
    )


def test_an_empty_list_answers_that_nothing_is_there() -> None:
    read = parse(answer(" [] "), "segment")
    assert (read.objects, read.failure) == ((), None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no tags",
        "<answer>[]",
        "[]</answer>",
        "</answer><answer>[]",
        answer(""),
        answer("{}"),
        answer("7"),
        answer("[1, 2, 3, 4]"),
        answer("[{}]"),
        answer("[[[[[[1]]]]]]"),
        answer("[" * 100_000),
        answer('{"a":' * 100_000),
        answer("[{'bbox_2d': [1,2,3,4]}]"),
        answer('[{"bbox_2d": [٠,١,٢,٣]}]'),
        answer('[{"bbox_2d": ["1","2","3","4"]}]'),
        answer('[{"bbox_2d": [true,false,true,true]}]'),
        answer('[{"bbox_2d": [NaN,2,3,4]}]'),
        answer('[{"bbox_2d": [1,2,Infinity,4]}]'),
        answer('[{"bbox_2d": [1,2,1e999,4]}]'),
        answer('[{"bbox_2d": [1,2,3,1e7]}]'),
        answer('[{"bbox_2d": [1,2,3,' + "9" * 4000 + "]}]"),
        answer('[{"bbox_2d": [1,2,3,' + "9" * 5000 + "]}]"),
        answer('[{"bbox_2d": [3,2,1,4]}]'),
        answer('[{"bbox_2d": [1,2,3]}]'),
        answer('[{"bbox_2d": null, "point_2d": "x"}]'),
        answer("[]\x00"),
        "<answer>" * 1000,
    ],
)
def test_what_is_no_answer_is_unparsed(text: str) -> None:
    read = parse(text, "segment")
    assert read.objects == ()
    assert read.failure is not None
    assert read.failure.kind is FailureKind.UNPARSED
    assert "\n" not in read.failure.detail


def test_unreadable_items_are_left_out_and_the_rest_stands() -> None:
    items = [item(), item(box=[1, 2, math.nan, 4], point=None), "x", None, {"label": "cat"}, item(box=[9, 9, 8, 8])]
    read = parse(answer(json.dumps(items)), "segment")
    assert [(o.box, o.point) for o in read.objects] == [((1, 2, 3, 4), (2, 3)), (None, (2, 3))]
    assert read.failure is None


def test_grounding_needs_a_box_where_counting_takes_a_point() -> None:
    text = answer('[{"point_2d": [2, 3]}]')
    assert len(parse(text, "count").objects) == 1
    failure = parse(text, "ground").failure
    assert failure is not None
    assert "box" in failure.detail


def test_lists_are_cut_at_120_objects() -> None:
    text = answer(json.dumps([item()] * 5000))
    assert len(parse(text, "segment").objects) == formats.published_objects(text).count == 120


def test_the_first_answer_counts() -> None:
    assert len(parse(answer("[]") + answer('[{"bbox_2d": [1,2,3,4]}]'), "segment").objects) == 0


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(["bbox_2d", "point_2d", "label", "x"]), inner, max_size=4)
    ),
)


@settings(max_examples=60)
@given(st.text() | json_like.map(lambda value: answer(json.dumps(value))))
def test_no_text_raises(text: str) -> None:
    for task in ("segment", "ground", "count"):
        read = parse(text, task)
        for found in read.objects:
            assert all(math.isfinite(number) for number in (found.box or ()) + (found.point or ()))
    assert 0 <= formats.answer_format(text) <= 2
    published = formats.published_objects(text)
    assert published.boxes.shape == (published.count, 4)
    assert published.points.shape == (published.count, 2)


# ---------------------------------------------------------------- the published rules

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
    assert formats.think_format(text) == float(THINK.fullmatch(text) is not None)
    for tag in ("think", "answer"):
        assert formats.section(text, tag) == reference_section(text, tag)
    bodies = [reference_section(text, tag) or "" for tag in ("think", "answer")]
    assert formats.look(text) == float(any(LOOK.search(body) for body in bodies))


@pytest.mark.parametrize(
    ("body", "worth"),
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
def test_answer_format(body: str, worth: float) -> None:
    assert formats.answer_format(answer(body)) == pytest.approx(worth)


@pytest.mark.parametrize(
    ("text", "worth"),
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
def test_non_repeat(text: str, worth: float) -> None:
    assert formats.non_repeat(text) == worth


def test_published_objects_are_all_or_nothing() -> None:
    two = formats.published_objects(answer(json.dumps([item(), item(box=[5, 6, 7, 8])])))
    assert (two.count, two.boxes.tolist(), two.points.tolist()) == (2, [[1, 2, 3, 4], [5, 6, 7, 8]], [[2, 3], [2, 3]])
    assert formats.published_objects(answer(json.dumps([item(), {"bbox_2d": [1, 2, 3, 4]}]))).count == 0
    assert formats.published_objects(answer(json.dumps({"bbox_2d": [1, 2, 3, 4]}))).count == 0
    null = formats.published_objects(answer(json.dumps([item(), item(point=[None, 1])])))
    np.testing.assert_equal(null.points, [[2, 3], [np.nan, 1]])
    for wrong in (item(box=[1, 2, 3]), item(point="x"), item(box=[[1, 2], [3, 4]]), item(point=[10**400, 1])):
        unusable = formats.published_objects(answer(json.dumps([item(), wrong])))
        assert unusable.count == 2
        assert np.isnan(unusable.boxes).all()
        assert np.isnan(unusable.points).all()
