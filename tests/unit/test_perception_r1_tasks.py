"""Guards Perception-R1's tasks: grounding, counting, detection and reading; what is read of any text, what is written,
the words of the prompts, and the measures that they alone have."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from perception.config import TaskConfig
from perception.frames import Frame
from perception.grammar import LONGEST
from perception.metrics import edit_distance
from perception.tasks import TASKS
from perception.types import Answer, AnswerObject, Box, FailureKind, MaskPrompt, Target
from reward_workers.components import COMPONENTS
from tests.builders import case, target

NAMES = ("perception_r1_ground", "perception_r1_count", "detect", "ocr")
GROUND, COUNT, DETECT, OCR = (TASKS[name] for name in NAMES)
FRAME = Frame(100, 60)


def boxes(*found: Box, label: str | None = None) -> tuple[AnswerObject, ...]:
    return tuple(AnswerObject(box=box, label=label) for box in found)


def labelled(*pairs: tuple[Box, str]) -> tuple[AnswerObject, ...]:
    return tuple(AnswerObject(box=box, label=label) for box, label in pairs)


def marked(*bodies: str) -> str:
    return "<|object_ref_start|>dogs<|object_ref_end|>" + "".join(f"<|box_start|>{one}<|box_end|>" for one in bodies)


def is_unparsed(read: Answer) -> bool:
    return not read.objects and read.failure is not None and read.failure.kind is FailureKind.UNPARSED


A, B = (1.0, 2.0, 30.0, 40.0), (5.0, 6.0, 7.0, 8.0)
JSON = '[{"bbox_2d": [1, 2, 30, 40], "label": "dog"}, {"bbox_2d": [5, 6, 7, 8], "label": "cat"}]'
TWO = labelled((A, "dog"), (B, "cat"))

MARKED_READ: dict[str, tuple[AnswerObject, ...]] = {
    marked("(1,2),(30,40)"): boxes(A),
    marked("(1,2),(30,40)", "(5,6),(7,8)"): boxes(A, B),
    marked("(1, 2, 30, 40)", "[5,6,7,8]"): boxes(A, B),  # brackets of either kind, as released
    "<|box_start|>(1,2),(30,40)<|box_end|>": boxes(A),  # without a name
    marked("(1,2),(30,40)") + marked("(5,6),(7,8)") + "<|im_end|>": boxes(A, B),
    marked("(1,2),(30,40)") + "<|box_start|>(5,6),(7": boxes(A),  # truncated
    marked("<|box_start|>(1,2),(30,40)"): boxes(A),  # nested
    marked("(30,2),(1,40)", "(5,6),(7,8)"): boxes(B),  # inverted
    marked("(1,2),(3,NaN)", "(5,6),(7,8)"): boxes(B),
    marked("(1,2),(3," + "9" * 5000 + ")", "(5,6),(7,8)"): boxes(B),
    marked("(1,2),(3,4),(5,6)", "(5,6),(7,8)"): boxes(B),
    marked("(-1.5,2),(30,40)"): boxes((-1.5, 2, 30, 40)),
    f"<think>{marked('x')}</think><answer>{marked('(1,2),(30,40)')}</answer>": boxes(A),
    JSON: TWO,
    f"```json\n{JSON}\n```": TWO,
    f"<answer>{JSON}</answer>": TWO,
    '[{"bbox_2d": [1, 2, 30, 40]}]': boxes(A),  # a name is not needed
    "[]": (),
    " ```json\n[ ]\n``` ": (),
    "<think>none</think><answer>[]</answer>": (),
}
MARKED_UNPARSED = (
    "",
    "nothing",
    "(1,2),(30,40)",
    "[1, 2, 30, 40]",
    "<answer>[]",
    "<|box_start|>(1,2),(30,40)",
    marked(),
    marked(""),
    marked("(1,2)"),
    marked("(a,b),(c,d)"),
    marked("(1,2),(30,1e9)"),
    marked("(1,2),(30,٤)"),
    marked("(30,40),(1,2)"),
    "<|box_end|>(1,2),(30,40)<|box_start|>",
    "<|BOX_START|>(1,2),(30,40)<|BOX_END|>",
    "[]" + marked("x"),
    "{}",
    "[{}]",
    '[{"label": "dog"}]',
    '[{"bbox_2d": [1, 2, 30, true]}]',
    "[" * 100_000,
)
DETECT_READ: dict[str, tuple[AnswerObject, ...]] = {
    JSON: TWO,
    f"```json\n{JSON}\n```": TWO,
    f"<think>x</think>\n<answer>```json{JSON}```</answer>": TWO,
    f"<answer>{JSON}</answer><answer>[]</answer>": TWO,
    JSON.replace('"cat"', "7"): TWO[:1],
    JSON.replace('"dog"', "null"): TWO[1:],
    JSON.replace("[1, 2, 30, 40]", "[1, 2, NaN, 40]"): TWO[1:],
    JSON.replace("[1, 2, 30, 40]", "[30, 2, 1, 40]"): TWO[1:],
    JSON.replace("[1, 2, 30, 40]", '"1, 2, 30, 40"'): TWO[1:],
    JSON.replace("{", '3, "x", null, [{"bbox_2d": [1, 2, 30, 40]}], {', 1): TWO,
    '[{"label": "un café 犬", "bbox_2d": [1, 2, 30, 40], "score": 1}]': labelled((A, "un café 犬")),
    '[{"bbox_2d": [1, 2, 30, 40], "label": "a", "label": "b"}]': labelled((A, "b")),
    json.dumps([{"bbox_2d": A, "label": "x" * 5000}]): labelled((A, "x" * 200)),
    '[{"bbox_2d": [1, 2, 30, 40], "label": ""}]': labelled((A, "")),
    "[]": (),
    "```json\n[]\n```": (),
}
DETECT_UNPARSED = (
    *("", "nothing", "{}", "7", "null", "[{}]", "[[]]", '"[]"', "<answer>[]", "<answer></answer>[]", "[" * 100_000),
    JSON[:-1],  # truncated
    JSON.replace('"', "'"),
    f"Here they are: {JSON}",
    JSON + JSON,
    '[{"bbox_2d": [1, 2, 30, 40]}]',
    '[{"label": "dog"}]',
    '[{"bbox_2d": [1, 2, 30, 1e7], "label": "dog"}]',
    '[{"bbox_2d": [1, 2, 30, ' + "9" * 5000 + '], "label": "dog"}]',
    '[{"point_2d": [1, 2], "label": "dog"}]',
    marked("(1,2),(30,40)"),
)


@pytest.mark.parametrize("text", MARKED_READ)
def test_grounding_and_counting_read(text: str) -> None:
    assert GROUND.parse(text) == COUNT.parse(text) == Answer(objects=MARKED_READ[text])


@pytest.mark.parametrize("text", MARKED_UNPARSED)
def test_grounding_and_counting_read_no_answer(text: str) -> None:
    assert is_unparsed(GROUND.parse(text)) and is_unparsed(COUNT.parse(text))


@pytest.mark.parametrize("text", DETECT_READ)
def test_detection_reads(text: str) -> None:
    assert DETECT.parse(text) == Answer(objects=DETECT_READ[text])


@pytest.mark.parametrize("text", DETECT_UNPARSED)
def test_detection_reads_no_answer(text: str) -> None:
    assert is_unparsed(DETECT.parse(text))


def test_counting_takes_points_and_grounding_does_not() -> None:
    text = '[{"point_2d": [5, 6]}]'
    assert COUNT.parse(text).objects == (AnswerObject(point=(5, 6)),) and is_unparsed(GROUND.parse(text))


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Hello", "Hello"),
        ("  two\n lines \n", "two\n lines"),
        ("<think>x</think><answer> Hello </answer> more", "Hello"),
        ("```\nHello\n```", "Hello"),
        ("[]", ""),
        ("<answer>[]</answer>", ""),
        ("[ ]", "[ ]"),
        ("[] and so on", "[] and so on"),
        ("<b>bold</b> </answer>", "<b>bold</b> </answer>"),
        ("NaN", "NaN"),
        ("null", "null"),
        ("9" * 5000, "9" * 5000),
        ("犬 é \ud800", "犬 é \ufffd"),
        ("x" * LONGEST, "x" * LONGEST),
        ("", None),
        (" \n ", None),
        ("``````", None),
        ("<answer></answer>", None),
        ("<answer>Hello", None),
        ("Hello <answer>", None),
        ("x" * (LONGEST + 1), None),
    ],
)
def test_reading_reads(text: str, read: str | None) -> None:
    found = OCR.parse(text)
    assert is_unparsed(found) if read is None else found == Answer(objects=(), text=read)


@pytest.mark.parametrize("piece", ["<|box_start|>", "<|box_start|>(1,2", "-", "1.", "[{", "```", "<answer>", "1,"])
def test_time_grows_with_the_text_and_no_faster(piece: str) -> None:
    """Quadratic reading of half a million characters would take minutes."""
    text, started = piece * (500_000 // len(piece)), time.perf_counter()
    for task in (COUNT, DETECT, OCR):
        task.parse(text)
        task.parse(marked(text))
    assert time.perf_counter() - started < 3


# ---------------------------------------------------------------- what is written is read back


@st.composite
def truths(draw: st.DrawFn) -> Target:
    """Up to three labelled boxes in whole pixels of 100 x 60."""
    found, labels = [], []
    for _ in range(draw(st.integers(0, 3))):
        x1, x2 = sorted(draw(st.lists(st.integers(0, 60), min_size=2, max_size=2, unique=True)))
        y1, y2 = sorted(draw(st.lists(st.integers(0, 100), min_size=2, max_size=2, unique=True)))
        found.append((x1, y1, x2, y2))
        labels.append(draw(st.text(st.sampled_from('ab ,"\\{}[]é犬'), max_size=6)))
    plain = target(found)
    return Target(boxes=plain.boxes, points=plain.points, labels=tuple(labels))


@settings(max_examples=40)
@given(truth=truths(), inline=st.booleans())
def test_the_ideal_answer_is_read_back(truth: Target, inline: bool) -> None:
    texts = [task.write(truth, FRAME, inline) for task in (GROUND, COUNT, DETECT)]
    reads = [task.parse(text) for task, text in zip((GROUND, COUNT, DETECT), texts, strict=True)]
    assert all(read.failure is None for read in reads)
    assert [[one.box for one in read.objects] for read in reads] == [[tuple(box) for box in truth.boxes.tolist()]] * 3
    assert tuple(one.label for one in reads[2].objects) == truth.labels
    assert all(("<look>" in text) == inline for text in texts)


@settings(max_examples=40)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<`"), max_size=30), inline=st.booleans()
)
def test_the_ideal_reading_is_read_back(text: str, inline: bool) -> None:
    empty = target()
    written = OCR.write(
        Target(boxes=empty.boxes, points=empty.points, complete=False, text=text.strip()), FRAME, inline
    )
    assert OCR.parse(written) == Answer(objects=(), text="" if text.strip() == "[]" else text.strip())
    assert ("<look>" in written) == inline


def test_the_ideal_answer_reads_as_published() -> None:
    plain = target([(1, 2, 30, 40), (5, 6, 7, 8)])
    named = Target(boxes=plain.boxes, points=plain.points, labels=("dog", "<cat"))
    dogs = "<|object_ref_start|>dog<|object_ref_end|>"
    dogs += "<|box_start|>(1,2),(30,40)<|box_end|><|box_start|>(5,6),(7,8)<|box_end|>"
    assert [COUNT.write(one, FRAME) for one in (plain, named)] == [dogs.replace("dog", "object"), dogs]
    assert DETECT.write(named, FRAME) == JSON.replace("cat", "<cat")
    assert DETECT.write(plain, FRAME) == JSON.replace("dog", "object").replace("cat", "object")
    assert [task.write(target(), FRAME) for task in (GROUND, COUNT, DETECT, OCR)] == ["[]"] * 4


def test_boxes_prompt_the_segmenter() -> None:
    assert [task.mask_prompts(Answer(objects=boxes(A, B))) for task in (GROUND, DETECT)] == [
        [MaskPrompt(box=A), MaskPrompt(box=B)]
    ] * 2
    assert not OCR.mask_prompts(Answer(objects=(), text="x"))


# ---------------------------------------------------------------- measures and prompt words


def test_metrics() -> None:
    first = {name: (TASKS[name].metrics[0], set(COMPONENTS[TASKS[name].metrics[0]].needs)) for name in NAMES}
    assert first == {
        "perception_r1_ground": ("box_accuracy", {"boxes"}),
        "perception_r1_count": ("count_exact", {"count"}),
        "detect": ("detection_f1", {"boxes", "labels"}),
        "ocr": ("perception_r1_ocr", {"text"}),
    }


TRUTH = ((0, 0, 10, 10), "dog"), ((50, 50, 60, 60), "cat")


@pytest.mark.parametrize(
    ("answered", "true", "f1"),
    [
        (TRUTH, TRUTH, 1),
        (TRUTH[::-1], TRUTH, 1),
        (TRUTH[:1], TRUTH, 2 / 3),
        ((*TRUTH, ((80, 80, 90, 90), "dog")), TRUTH, 0.8),
        ((TRUTH[0], ((50, 50, 60, 60), "cow")), TRUTH, 0.5),  # a wrong label
        ((TRUTH[0], TRUTH[0]), TRUTH[:1], 2 / 3),  # said twice
        ((((0, 0, 10, 5), "dog"),), TRUTH[:1], 0),  # IoU 0.5 does not exceed 0.5
        ((((0, 0, 10, 6), "dog"),), TRUTH[:1], 1),
        ((), TRUTH, 0),
        (TRUTH, (), 0),
        ((), (), 1),
    ],
)
def test_detection_f1(answered: Any, true: Any, f1: float) -> None:
    plain = target([box for box, _ in true])
    truth = Target(boxes=plain.boxes, points=plain.points, labels=tuple(label for _, label in true))
    measured = case("", truth, answer=Answer(objects=labelled(*answered)))
    assert COMPONENTS["detection_f1"](measured) == pytest.approx(f1)
    assert COMPONENTS["detection_f1"](case("no list", truth)) == 0


@pytest.mark.parametrize(
    ("said", "true", "distance"),
    [("kitten", "sitting", 3), ("the cat sat on the mat", "the cat is on the mat", 3), ("", "abc", 3), ("abc", "", 3),
     ("", "", 0), ("abc", "abc", 0), ("ab", "ba", 2), ("犬", "é", 1), ("abcdef", "xabcdefy", 2)],
)  # fmt: skip
def test_edit_distance_and_likeness_of_texts(said: str, true: str, distance: int) -> None:
    assert edit_distance(said, true) == edit_distance(true, said) == distance
    truth = Target(boxes=np.empty((0, 4)), points=np.empty((0, 2)), complete=False, text=true)
    read = case("", truth, answer=Answer(objects=(), text=said))
    assert COMPONENTS["perception_r1_ocr"](read) == pytest.approx(1 - distance / max(len(said), len(true), 1))
    assert COMPONENTS["perception_r1_ocr"](case("not read", truth)) == 0


def test_prompts_as_released() -> None:
    entries: Any = OmegaConf.to_container(OmegaConf.load(Path("conf/task/perception_r1.yaml")), resolve=True)
    found = {name: TaskConfig(**entry) for name, entry in entries.items()}
    assert {name: (one.form, one.template) for name, one in found.items()} == {
        "ground": ("perception_r1_ground", "Output the bounding box of the {question} in the image."),
        "count": ("perception_r1_count", "Output all the bounding boxes of the {question}"),
        "detect": ("detect", "Please output bbox coordinates and names of {question}."),
        "locate": ("detect", "Locate every item from the category list in the image and output the coordinates in JSON "
                             "format. The category set includes {question}."),
        "ocr": ("ocr", "OCR this image: "),
    }  # fmt: skip
    assert found["ground"].system == found["detect"].system == "You are a helpful assistant. "
    for one in found.values():
        assert one.inline.startswith(one.template) and "<look>" in one.inline and "\\" not in one.inline + one.again
