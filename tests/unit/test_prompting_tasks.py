"""Guards Seg-Zero's and Seg-R1's tasks: what is read of any text, what is written, how SAM2 is prompted, the words."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from perception.config import TaskConfig
from perception.frames import Frame, convert_answer
from perception.tasks import TASKS
from perception.types import Answer, AnswerObject, Box, FailureKind, MaskPrompt, Point, Target
from reward_workers.passes import Pass, mask_prompts
from tests.builders import sample, target

SEG_ZERO, FOREGROUND, POINTS = (TASKS[name] for name in ("seg_zero", "foreground", "foreground_points"))


def one(box: Box | None = None, *on: Point, off: tuple[Point, ...] = ()) -> AnswerObject:
    """A box with points on and beside the object; the first one on it is the measured one."""
    return AnswerObject(box=box, point=on[0] if on else None, further=on[1:], background=off)


def is_unparsed(read: Answer) -> bool:
    return not read.objects and read.failure is not None and read.failure.kind is FailureKind.UNPARSED


def zero(body: str) -> str:
    return f"<think>t</think><answer>{body}</answer>"


def tags(box: str = "[1,2,30,40]", points: str = "[[5,6],[7,8]]", labels: str = "[1,0]") -> str:
    return f"<think>t</think> <bbox>{box}</bbox>, <points>{points}</points>, <labels>{labels}</labels>"


BOX: Box = (1, 2, 30, 40)
WHOLE = '{"bbox": [1, 2, 30, 40], "points_1": [5, 6], "points_2": [7, 8]}'
FULL = (one(BOX, (5, 6), (7, 8)),)

SEG_ZERO_READ: dict[str, tuple[AnswerObject, ...]] = {
    zero(WHOLE): FULL,
    WHOLE: FULL,  # without tags, as released
    f"<think>{WHOLE}</think><answer>": FULL,  # truncated, and in the thinking: the first braces count
    zero(f"{{}} {WHOLE}"): FULL,  # empty braces are none
    zero(WHOLE) + zero('{"bbox": [9, 9, 9, 9]}'): FULL,
    f"<answer><answer>{WHOLE}</answer></answer>": FULL,
    zero('{"BBox_2d": [1, 2, 30, 40], "Points_A": [5, 6], "x": 3, "points": [7, 8], "points_3": [9, 9]}'): FULL,
    zero('{"bbox": [1.5, -2, 30, 40]}'): (one((1.5, -2, 30, 40)),),
    zero('{"bbox": [1, 2, 30, 40], "points_1": [NaN, 6], "points_2": [7, 8]}'): (one(BOX, (7, 8)),),
    zero('{"bbox": [1, 2, 30, 40], "point_1": [5, 6], "points_2": "7, 8"}'): (one(BOX),),
    zero('{"bbox": [9, 9, 1, 1], "bbox": [1, 2, 30, 40]}'): (one(BOX),),  # JSON: the last of equal keys
    zero("[]"): (),
    zero(" [ ] "): (),
}
SEG_ZERO_UNPARSED = (
    "",
    "nothing",
    "[]",
    "<answer>[]",
    zero(""),
    zero("{}"),
    zero("null"),
    zero("[1, 2, 30, 40]"),
    zero("{'bbox': [1,2,30,40], 'points_1': [5,6], 'points_2': [7,8]}"),  # the prompt's own example
    zero('{"bbox": [1, 2, 30, 40'),
    zero('{"bbox": [1, 2, 30]}'),
    zero('{"bbox": [30, 2, 1, 40]}'),
    zero('{"bbox": [NaN, 2, 30, 40]}'),
    zero('{"bbox": [1, 2, 30, 1e9]}'),
    zero('{"bbox": [1, 2, 30, ' + "9" * 5000 + "]}"),
    zero('{"bbox": ["1", "2", "30", "40"]}'),
    zero('{"bbox": [true, 2, 30, 40]}'),
    zero('{"bbox": {"bbox": [1, 2, 30, 40]}}'),  # the braces end at the first }
    zero('{"points_1": [5, 6], "points_2": [7, 8]}'),
    f"<think>as in {{x}}</think><answer>{WHOLE}</answer>",  # the first braces, as released
    zero('{"bbox": ' + "[" * 50_000 + "}"),
)
FOREGROUND_READ: dict[str, tuple[AnswerObject, ...]] = {
    tags(): (one(BOX, (5, 6), off=((7, 8),)),),
    "<labels>[1,0]</labels> x <points>[[5,6],[7,8]]</points><bbox>[1,2,30,40]</bbox>": (
        one(BOX, (5, 6), off=((7, 8),)),
    ),
    tags("[1, 2, 30, 40,]", "[[5,6,],[7,8],]", "[1,\n1, ]"): (one(BOX, (5, 6), (7, 8)),),
    tags(points="[[1,2],[30,40],[0,2],[31,40]]", labels="[1,0,1,0]"): (one(BOX, (1, 2), off=((30, 40),)),),
    tags(labels="[1]"): (one(BOX),),  # fewer labels than points
    tags(labels="[1,2]"): (one(BOX, (5, 6)),),
    tags(points="[[5,6],[7.5,8]]"): (one(BOX),),  # fractions are not read, as released
    tags(points="[[5,6],7]"): (one(BOX),),
    tags(points="[[5,-6],[7,8]]"): (one(BOX),),
    tags(points="[[5,6],[7,9999999]]"): (one(BOX),),
    tags("[30,2,1,40]"): (one(None, (5, 6), off=((7, 8),)),),
    tags(points="[]", labels="[]"): (one(BOX),),
    "<bbox>[1,2,30,40]</bbox><bbox>[6,7,50,60]</bbox><points>[[5,6],[7,8]]</points><labels>[0,1]</labels>": (
        one(BOX, (7, 8), off=((5, 6),)),
        one((6, 7, 50, 60), (7, 8)),
    ),
    "<points>[[5,6],[7,8]]</points> <labels>[1,0]</labels>": (one(None, (5, 6), off=((7, 8),)),),
    "<points><points>[[5,6]]</points></points><labels>[1]</labels>": (one(None, (5, 6)),),
    "<points>x</points><points>[[5,6]]</points><points>[[1,1]]</points><labels>[1]</labels>": (one(None, (5, 6)),),
    tags("[]", "[]", "[]"): (),
    "<points>[ ]</points> <labels>[]</labels>": (),
}
FOREGROUND_UNPARSED = (
    "",
    "[]",
    "<bbox>[]</bbox>",
    "<points>[]</points>",
    "<bbox>[1,2,30,40]",
    "<bbox>1,2,30,40</bbox>",
    "<bbox>[1,2,30]</bbox>",
    "<bbox>[1,2,30,4.5]</bbox>",
    "<bbox>[1,2,30,NaN]</bbox>",
    "<bbox>[1,2,30,٤]</bbox>",
    "<bbox>[[1,2,30,40]]</bbox>",
    "<bbox>[1,2,30," + "9" * 5000 + "]</bbox>",
    "<bbox>[1,2,30,40]</points>",
    "<BBOX>[1,2,30,40]</BBOX>",
    "<points>[[5,6]]</points>",
    "<points>[[5,6]]</points><labels>[]</labels>",
    "<points>[[5,6]]</points><labels>[3]</labels>",
    "<points>[[5,6]]</points><labels>1</labels>",
    "<points>[]</points><labels>[1]</labels>",
    "<points>" + "[" * 50_000 + "</points><labels>[1]</labels>",
)


@pytest.mark.parametrize("text", SEG_ZERO_READ)
def test_seg_zero_reads(text: str) -> None:
    assert SEG_ZERO.parse(text) == Answer(objects=SEG_ZERO_READ[text])


@pytest.mark.parametrize("text", SEG_ZERO_UNPARSED)
def test_seg_zero_reads_no_answer(text: str) -> None:
    assert is_unparsed(SEG_ZERO.parse(text))


@pytest.mark.parametrize("text", FOREGROUND_READ)
def test_foreground_reads(text: str) -> None:
    assert FOREGROUND.parse(text) == Answer(objects=FOREGROUND_READ[text])


@pytest.mark.parametrize("text", FOREGROUND_UNPARSED)
def test_foreground_reads_no_answer(text: str) -> None:
    assert is_unparsed(FOREGROUND.parse(text))


def test_points_alone_where_boxes_are_not_asked_for() -> None:
    assert POINTS.parse(tags()) == Answer(objects=(one(None, (5, 6), off=((7, 8),)),))
    assert is_unparsed(POINTS.parse(tags(labels="[1]")))


@pytest.mark.parametrize(
    "piece",
    [
        "{",
        "{}",
        "<answer>",
        "<points>",
        "<points>[",
        "<bbox>[1,2,3,4]</bbox>",
        "<points>[[1,2]",
        ",    ",
        "<labels>[1,",
    ],
)
def test_time_grows_with_the_text_and_no_faster(piece: str) -> None:
    """Quadratic reading of half a million characters would take minutes."""
    text, started = piece * (500_000 // len(piece)), time.perf_counter()
    for task in (SEG_ZERO, FOREGROUND, POINTS):
        task.parse(text)
    assert time.perf_counter() - started < 3


def test_no_more_than_128_boxes_and_points_are_looked_at() -> None:
    text = "<bbox>[0,0,9,9]</bbox>" * 300 + f"<points>{[[1, 1]] * 300}</points><labels>{[0] * 300}</labels>"
    objects = FOREGROUND.parse(text).objects
    assert (len(objects), {len(found.background) for found in objects}) == (128, {128})


# ---------------------------------------------------------------- what is written is read back


@st.composite
def truths(draw: st.DrawFn) -> Target:
    """Up to three objects in whole pixels of 100 x 60, each with a point in its box."""
    boxes, points = [], []
    for _ in range(draw(st.integers(0, 3))):
        x1, x2 = sorted(draw(st.lists(st.integers(0, 60), min_size=2, max_size=2, unique=True)))
        y1, y2 = sorted(draw(st.lists(st.integers(0, 100), min_size=2, max_size=2, unique=True)))
        boxes.append((x1, y1, x2, y2))
        points.append((draw(st.integers(x1, x2 - 1)), draw(st.integers(y1, y2 - 1))))
    return target(boxes, points)


def lists(truth: Target) -> tuple[list[Box], list[Point]]:
    return [tuple(box) for box in truth.boxes.tolist()], [tuple(point) for point in truth.points.tolist()]  # type: ignore[misc]


@settings(max_examples=40)
@given(truth=truths(), inline=st.booleans())
def test_the_ideal_answer_is_read_back(truth: Target, inline: bool) -> None:
    frame, (boxes, points) = Frame(100, 60), lists(truth)
    texts = [task.write(truth, frame, inline) for task in (SEG_ZERO, FOREGROUND, POINTS)]
    assert SEG_ZERO.parse(texts[0]).objects == tuple(one(boxes[0], points[0], points[0]) for _ in boxes[:1])
    within = [[p for p in points if b[0] <= p[0] <= b[2] and b[1] <= p[1] <= b[3]] for b in boxes]
    assert FOREGROUND.parse(texts[1]).objects == tuple(one(b, *inside) for b, inside in zip(boxes, within, strict=True))
    assert POINTS.parse(texts[2]).objects == ((one(None, *points),) if points else ())
    assert all(("<look>" in text) == inline for text in texts)


def test_the_ideal_answer_reads_as_published() -> None:
    truth, frame = target([(10, 20, 50, 60), (80, 5, 100, 30)], [(30, 40), (90, 15)]), Frame(112, 112)
    assert SEG_ZERO.write(truth, frame) == (
        '<think>left</think><answer>{"bbox": [10, 20, 50, 60], "points_1": [30, 40], "points_2": [30, 40]}</answer>'
    )
    assert FOREGROUND.write(truth, frame) == (
        "<think>left and upper right</think> <bbox>[10,20,50,60]</bbox>, <bbox>[80,5,100,30]</bbox>, "
        "<points>[[30,40],[90,15]]</points>, <labels>[1,1]</labels>"
    )
    assert POINTS.write(truth, frame) == "<points>[[30,40],[90,15]]</points>, <labels>[1,1]</labels>"
    assert FOREGROUND.write(target(), frame).endswith(
        "</think> <bbox>[]</bbox>, <points>[]</points>, <labels>[]</labels>"
    )


# ---------------------------------------------------------------- to SAM2


def test_every_point_reaches_the_segmenter_in_the_images_pixels_with_its_label() -> None:
    """Answered in 100 x 100 about an image of 20 x 30 pixels (height x width); what lies outside is cut."""
    read = FOREGROUND.parse(tags("[10,10,90,100]", "[[50,50],[90,100],[20,40]]", "[0,1,1]"))
    moved = convert_answer(read, Frame(100, 100), Frame(20, 30))
    assert moved.objects == (one((3, 2, 27, 20), (27, 20), (6, 8), off=((15, 10),)),)
    (prompt,), owners = mask_prompts([Pass(moved, None, 0)], "foreground", 20, 30)
    assert prompt == MaskPrompt(box=(3, 2, 27, 20), points=((6, 8), (15, 10)), labels=(1, 0))
    assert owners.tolist() == [0]


def test_both_points_of_seg_zero_prompt_one_mask() -> None:
    assert SEG_ZERO.mask_prompts(SEG_ZERO.parse(WHOLE)) == [MaskPrompt(box=BOX, points=((5, 6), (7, 8)))]
    assert SEG_ZERO.mask_prompts(SEG_ZERO.parse(zero("[]"))) == []


def test_background_alone_prompts_too() -> None:
    read = POINTS.parse("<points>[[5,6]]</points><labels>[0]</labels>")
    assert POINTS.mask_prompts(read) == [MaskPrompt(points=((5, 6),), labels=(0,))]


# ---------------------------------------------------------------- questions, metrics, prompt words


def test_questions_and_metrics() -> None:
    asked = sample(question="The LEFT dog.")
    assert [task.question(asked) for task in (SEG_ZERO, FOREGROUND)] == ["the left dog", "The LEFT dog."]
    assert [task.metrics[0] for task in (SEG_ZERO, FOREGROUND, POINTS)] == ["mask_iou", "s_measure", "s_measure"]


def words(preset: str) -> dict[str, TaskConfig]:
    entries: Any = OmegaConf.to_container(OmegaConf.load(Path("conf/task", f"{preset}.yaml")), resolve=True)
    return {name: TaskConfig(**entry) for name, entry in entries.items()}


@pytest.mark.parametrize("preset", ["seg_zero", "seg_r1", "seg_r1_prerl"])
def test_prompts_are_whole_and_their_form_is_registered(preset: str) -> None:
    for name, entry in words(preset).items():
        assert (entry.form or name) in TASKS
        assert entry.inline.startswith(entry.template) and "<look>" in entry.inline and entry.again
        assert entry.system is None or "  " not in entry.system


def test_prompts_as_released() -> None:
    """Places where a line could have been joined wrongly, and the differences of Seg-R1's system turns."""
    zero, one, pre = words("seg_zero"), words("seg_r1"), words("seg_r1_prerl")
    assert "most closely matched one.Output the thinking process" in zero["segment"].template
    assert zero["segment"].template.endswith(
        "here </think><answer>{'bbox': [10,100,200,210], 'points_1': [30,110], 'points_2': [35,180]}</answer>"
    )
    systems = [one[name].system or "" for name in ("segment", "refer")]
    assert systems[0].replace("[[x1,y1],[x2,y2]", "[[x3,y3],[x4,y4]").startswith(systems[1])
    assert systems[0].endswith("point. Only generate a moderate number of points, enough to clearly outline the "
                               "object without overloading the system.")  # fmt: skip
    assert one["segment"].template.endswith("<points>[[x3,y3],[x4,y4],...]</points>, <labels>[1,0,...]</labels>\n")
    assert one["refer"].template == "Identify and segment {question}"
    assert pre["segment"].template.count("\n") == 11 and pre["segment"].system is None
