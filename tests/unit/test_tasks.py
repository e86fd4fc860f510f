"""Guards the tasks: what an answer is, what a task writes it reads back, questions, prompts for the segmenter."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception.frames import Frame
from perception.tasks import TASKS
from perception.tasks.objects import whereabouts
from perception.tasks.segment import Segment
from perception.types import Answer, AnswerObject, FailureKind, MaskPrompt, Target
from reward_workers.components import COMPONENTS, held_out_terms, needs
from reward_workers.components.dr_seg import published_objects
from reward_workers.passes import Pass, mask_prompts
from tests.builders import Box, case, sample, target

GOOD = (
    '<think>a <look>red edge</look> b</think>\n<answer>[{"bbox_2d": [1, 2, 3.5, 4], "point_2d": [2, 3], "label": "cat"}'
    ', {"bbox_2d": [5, 6, 7, 8], "point_2d": [6, 7]}]</answer>'
)


LISTS = ("segment", "ground", "count", "dr_seg", "dr_seg_ground", "dr_seg_count")
"""Tasks whose answers are VisionReasoner's list; the others have test files of their own."""


def answer(body: str) -> str:
    return f"<think>t</think><answer>{body}</answer>"


def item(box: object = (1, 2, 3, 4), point: object = (2, 3)) -> dict[str, Any]:
    return {"bbox_2d": box, "point_2d": point}


def test_reads_boxes_points_and_labels() -> None:
    read = TASKS["segment"].parse(GOOD)
    assert read == Answer(
        objects=(
            AnswerObject(box=(1, 2, 3.5, 4), point=(2, 3), label="cat"),
            AnswerObject(box=(5, 6, 7, 8), point=(6, 7)),
        )
    )


def test_an_empty_list_answers_that_nothing_is_there() -> None:
    read = TASKS["segment"].parse(answer(" [] "))
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
    read = TASKS["segment"].parse(text)
    assert read.objects == ()
    assert read.failure is not None
    assert read.failure.kind is FailureKind.UNPARSED
    assert "\n" not in read.failure.detail


def test_unreadable_items_are_left_out_and_the_rest_stands() -> None:
    items = [item(), item(box=[1, 2, math.nan, 4], point=None), "x", None, {"label": "cat"}, item(box=[9, 9, 8, 8])]
    read = TASKS["segment"].parse(answer(json.dumps(items)))
    assert [(o.box, o.point) for o in read.objects] == [((1, 2, 3, 4), (2, 3)), (None, (2, 3))]
    assert read.failure is None


def test_grounding_needs_a_box_where_counting_takes_a_point() -> None:
    text = answer('[{"point_2d": [2, 3]}]')
    assert len(TASKS["count"].parse(text).objects) == 1
    failure = TASKS["ground"].parse(text).failure
    assert failure is not None
    assert "box" in failure.detail


def test_long_lists_are_cut_and_earlier_in_published_accuracy() -> None:
    text = answer(json.dumps([item()] * 5000))
    published = published_objects(case(text))
    assert (len(TASKS["segment"].parse(text).objects), len(published.boxes)) == (4096, 120)


def test_the_first_answer_counts() -> None:
    assert len(TASKS["segment"].parse(answer("[]") + answer('[{"bbox_2d": [1,2,3,4]}]')).objects) == 0


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
    for task in TASKS:
        read = TASKS[task].parse(text)
        for found in read.objects:
            points = (*found.further, *found.background, *((found.point,) if found.point else ()))
            assert all(math.isfinite(number) for number in (*(found.box or ()), *chain(*points)))
    one = case(text)
    assert 0 <= COMPONENTS["answer_format"].measure(one) <= 2
    published = published_objects(one)
    assert published.boxes.shape == (len(published.raw[0]), 4)
    assert published.points.shape == (len(published.raw[1]), 2)


# ---------------------------------------------------------------- what a task writes it reads

FRAMES = (Frame(112, 112), Frame(476, 644), Frame(1000, 1000), Frame(28, 308))


@st.composite
def truths(draw: st.DrawFn) -> tuple[Frame, Target]:
    """Up to four objects in whole pixels of a frame, each with a point inside its box."""
    frame = draw(st.sampled_from(FRAMES))
    boxes, points = [], []
    for _ in range(draw(st.integers(0, 4))):
        (x1, x2), (y1, y2) = (
            sorted(draw(st.lists(st.integers(0, int(side)), min_size=2, max_size=2, unique=True)))
            for side in (frame.width, frame.height)
        )
        boxes.append((x1, y1, x2, y2))
        points.append((draw(st.integers(x1, x2 - 1)), draw(st.integers(y1, y2 - 1))))
    return frame, target(boxes, points)


@pytest.mark.parametrize("name", LISTS)
@settings(max_examples=40)
@given(truth=truths(), inline=st.booleans())
def test_the_ideal_answer_is_read_back(name: str, truth: tuple[Frame, Target], inline: bool) -> None:
    frame, wanted = truth
    text = TASKS[name].write(wanted, frame, inline)
    read = TASKS[name].parse(text)
    assert read.failure is None
    assert [one.box for one in read.objects] == [tuple(box) for box in wanted.boxes.tolist()]
    assert [one.point for one in read.objects] == [tuple(point) for point in wanted.points.tolist()]
    assert inline == ("<look>" in text)
    form = case(text)
    assert COMPONENTS["think_format"].measure(form) == 1 and COMPONENTS["look"].measure(form) == float(inline)
    assert COMPONENTS["answer_format"].measure(form) == (2 if wanted.count else 0)


def test_written_coordinates_are_whole_and_inside_the_frame() -> None:
    """Half pixels go to the even one, boxes may end at the edge and points may not lie on it."""
    text = TASKS["segment"].write(target([(-0.6, 0.5, 112.4, 111.5)], [(111.8, 0.4)]), Frame(112, 112))
    assert text.endswith('<answer>[{"bbox_2d": [0,0,112,112], "point_2d": [111,0]}]</answer>')


def test_the_ideal_answer_reads_as_published() -> None:
    two = target([(10, 20, 50, 60), (80, 5, 100, 30)], [(30, 40), (90, 15)])
    assert TASKS["segment"].write(two, Frame(112, 112), inline=True) == (
        "<think><look>left and upper right</look></think><answer>"
        '[{"bbox_2d": [10,20,50,60], "point_2d": [30,40]}, {"bbox_2d": [80,5,100,30], "point_2d": [90,15]}]</answer>'
    )
    assert TASKS["segment"].write(target(), Frame(112, 112)) == "<think>nowhere</think><answer>[]</answer>"


def test_whereabouts_names_the_ninth_of_the_image() -> None:
    frame = Frame(90, 90)
    assert [whereabouts(p, frame) for p in ((45, 45), (0, 0), (89, 89), (45, 0), (0, 45))] == [
        "middle", "upper left", "lower right", "upper", "left",
    ]  # fmt: skip


# ---------------------------------------------------------------- questions, prompts for the segmenter, metrics


@pytest.mark.parametrize("name", LISTS)
def test_only_the_published_tasks_normalise_the_question(name: str) -> None:
    asked = sample(question="..The LEFT dog, e.g. Rex...")
    expected = "the left dog, e.g. rex" if name.startswith("dr_seg") else asked.question
    assert TASKS[name].question(asked) == expected


@pytest.mark.parametrize("name", LISTS)
def test_every_object_prompts_the_segmenter_with_its_box_and_point(name: str) -> None:
    """Where it has no box its point alone; nothing answered, nothing prompted."""
    box, point = (1.0, 2.0, 30.0, 40.0), (15.0, 20.0)
    objects = (AnswerObject(box=box, point=point), AnswerObject(box=box), AnswerObject(point=point))
    assert TASKS[name].mask_prompts(Answer(objects=objects)) == [
        MaskPrompt(box=box, points=(point,)),
        MaskPrompt(box=box),
        MaskPrompt(points=(point,)),
    ]
    assert not TASKS[name].mask_prompts(Answer(objects=()))


def test_every_task_says_how_it_is_measured_and_what_truth_that_needs() -> None:
    found = {name: (TASKS[name].metrics[0], needs(held_out_terms(TASKS[name].metrics))) for name in LISTS}
    segment, ground, count = ("mask_iou", {"masks"}), ("box_accuracy", {"boxes"}), ("count_exact", {"count"})
    assert found == {
        "segment": segment, "ground": ground, "count": count,
        "dr_seg": segment, "dr_seg_ground": ground, "dr_seg_count": count,
    }  # fmt: skip


class Spots(Segment):
    """Every box with three points: the first object, and two that are not meant."""

    def mask_prompts(self, answer: Answer) -> Sequence[MaskPrompt]:
        points = tuple(one.point for one in answer.objects if one.point)
        return [MaskPrompt(box=one.box, points=points, labels=(1, 0, 0)) for one in answer.objects[:1]]


def test_prompts_are_cut_at_the_images_edges_and_labels_stay_with_their_points(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(TASKS._entries, "spots", Spots())

    def cut(box: Box | None, *points: tuple[float, float]) -> list[MaskPrompt]:
        """In an image of 20 x 30 pixels."""
        objects = (AnswerObject(box=box, point=points[0]), *(AnswerObject(point=point) for point in points[1:]))
        prompts, owners = mask_prompts([Pass(Answer(objects=()), None, 0), Pass(Answer(objects=objects), None, 0)],
                                       "spots", height=20, width=30)  # fmt: skip
        assert owners.tolist() == [1] * len(prompts)
        return prompts

    inside = (12.0, 8.0)
    assert cut((-5, -5, 40, 10), inside, (3, 4), (29.9, 19.9)) == [
        MaskPrompt(box=(0, 0, 30, 10), points=(inside, (3, 4), (29.9, 19.9)), labels=(1, 0, 0))
    ]
    # the image ends before x = 30 and y = 20; what is left of the points keeps its label
    assert cut((5, 5, 9, 9), (-0.1, 4), inside, (30, 4)) == [
        MaskPrompt(box=(5, 5, 9, 9), points=(inside,), labels=(0,))
    ]
    assert cut((5, 5, 9, 9), (4, 20), (4, -1), (3, 19)) == [
        MaskPrompt(box=(5, 5, 9, 9), points=((3, 19),), labels=(0,))
    ]
    # nothing is left of a box outside or without area
    assert cut((31, 0, 40, 10), inside, (0, 0), (1, 1))[0].box is None
    assert cut((5, 5, 5, 9), inside, (0, 0), (1, 1))[0].box is None
    assert cut((-9, -9, -1, -1), (-1, 0), (0, -1), (31, 0)) == []


def test_points_without_labels_are_all_foreground(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(Segment):
        def mask_prompts(self, answer: Answer) -> Sequence[MaskPrompt]:
            return [MaskPrompt(points=((1, 1), (99, 1), (2, 2)))]

    monkeypatch.setitem(TASKS._entries, "two", Two())
    (prompt,), _ = mask_prompts([Pass(Answer(objects=()), None, 0)], "two", 20, 30)
    assert prompt == MaskPrompt(points=((1, 1), (2, 2)), labels=(1, 1))
