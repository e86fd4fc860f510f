"""Guards the `dr_seg` preset against Dr. Seg's code: its prompt to the letter, and what it makes of odd completions.

Every expected number is worked out by hand from the published rules. The truth is two squares of 100 x 100 pixels, A
and B, in an image of 840 x 840; "M" is the count of answered objects as the published accuracy sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml

from launch.run.config import CONF, compose
from launch.run.prompts import PromptMaker
from perception.config import ModelConfig, TaskConfig
from perception.types import Target
from reward_workers.components import COMPONENTS, Case, reward_terms
from tests import builders
from tests.builders import sample, target

TRUTH = target([(100, 100, 199, 199), (400, 400, 499, 499)], [(150, 150), (450, 450)])
FORMATS = ("think_format", "answer_format", "look", "non_repeat")
ACCURACY = ("dr_seg_iou", "dr_seg_count", "dr_seg_points")
A = '{"bbox_2d": [100, 100, 199, 199], "point_2d": [150, 150]}'
B = '{"bbox_2d": [400, 400, 499, 499], "point_2d": [450, 450]}'
AB = f"[{A}, {B}]"
THINK = "I see <look>two squares</look> here"
NONE = (0.0, 0.0, 0.0)  # M = 0 where there are two objects
WHOLE_MARKS = (1.0, 2.0, 1.0, 1.0)


def said(answer: str = AB, think: str = THINK) -> str:
    return f"<think>{think}</think><answer>{answer}</answer>"


def one(box: str = "[100, 100, 199, 199]", point: str = "[150, 150]") -> str:
    return said(f'[{{"bbox_2d": {box}, "point_2d": {point}}}]')


@dataclass(frozen=True)
class Row:
    name: str
    text: str
    formats: tuple[float, float, float, float] = WHOLE_MARKS
    """think_format, answer_format, look, non_repeat"""
    raw: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """x1, x2, x3"""


TAGS = [
    Row("as asked", said()),
    Row("the other order", said(f"[{B}, {A}]")),
    Row("a line between", f"<think>{THINK}</think> \n\t<answer>{AB}</answer>"),
    Row("lines within", f"<think>\n{THINK}\n</think>\n<answer>\n{AB}\n</answer>"),
    Row("words between", f"<think>{THINK}</think> so <answer>{AB}</answer>", (0, 2, 1, 1)),
    Row("blank before", " " + said(), (0, 2, 1, 1)),
    Row("line after", said() + "\n", (0, 2, 1, 1)),
    Row("words after", said() + " Done", (0, 2, 1, 1)),
    Row("end token after", said() + "<|im_end|>", (0, 2, 1, 1)),
    Row("no think", f"<answer>{AB}</answer>", (0, 2, 0, 1)),
    Row("empty think", said(think=""), (1, 2, 0, 1)),
    Row("capital tags", f"<THINK>{THINK}</THINK><ANSWER>{AB}</ANSWER>", (0, 0, 0, 1), NONE),
    Row("blank inside a tag", f"<think>{THINK}</think><answer >{AB}</answer>", (0, 0, 1, 1), NONE),
    Row("answer before think", f"<answer>{AB}</answer><think>{THINK}</think>", (0, 2, 1, 1)),
    Row("think inside answer", f"<answer><think>{THINK}</think>{AB}</answer>", (0, 0, 1, 1), NONE),
    # The whole answer lies in the think block: no closing tag is followed by an answer.
    Row("answer inside think", f"<think>{THINK}<answer>{AB}</answer></think>", (0, 2, 1, 1)),
    # .*? runs over further tags; the look is sought in the first think body, "a".
    Row("two think blocks", f"<think>a</think><think>{THINK}</think><answer>{AB}</answer>", (1, 2, 0, 1)),
    Row("think in think", f"<think>a<think>{THINK}</think></think><answer>{AB}</answer>"),
    Row("think not closed", f"<think>{THINK}<answer>{AB}</answer>", (0, 2, 0, 1)),
    Row("answer not closed", f"<think>{THINK}</think><answer>{AB}", (0, 0, 1, 1), NONE),
    Row("answer not opened", f"<think>{THINK}</think>{AB}</answer>", (0, 0, 1, 1), NONE),
    Row("the first of two answers counts", said("[]") + f"<answer>{AB}</answer>", (1, 0, 1, 1), NONE),
    Row("a bad second answer", said() + "<answer>nothing</answer>"),
    Row("answer in answer", said(f"<answer>{AB}</answer>"), (1, 0, 1, 1), NONE),
    Row("nothing at all", "", (0, 0, 0, 1), NONE),
    Row("only tags", "<think></think><answer></answer>", (1, 0, 0, 1), NONE),
]

LOOKS = [
    Row("look across lines", said(think="<look>\nred\nsquare\n</look>")),
    Row("two looks", said(think="<look>red</look> and <look>blue</look>")),
    Row("empty look", said(think="a <look></look> b"), (1, 2, 0, 1)),
    Row("look of blanks", said(think="<look> \n\u3000</look>"), (1, 2, 0, 1)),
    # \S is the "<" of the closing tag, and the pattern runs on to the next one.
    Row("empty look, then one", said(think="<look></look> <look>red</look>")),
    Row("two empty looks", said(think="<look></look><look></look>")),
    Row("look not closed", said(think="<look>red"), (1, 2, 0, 1)),
    Row("look closed first", said(think="</look>red<look>"), (1, 2, 0, 1)),
    Row("look in look", said(think="<look><look>red</look></look>")),
    Row("capital look", said(think="<LOOK>red</LOOK>"), (1, 2, 0, 1)),
    Row("look outside both", f"<think>a</think><look>red</look><answer>{AB}</answer>", (0, 2, 0, 1)),
    Row("look around the answer", said(f"<look>{AB}</look>", think="a"), (1, 0, 1, 1), NONE),
    Row("look in a label", said(f'[{A[:-1]}, "label": "<look>red</look>"}}, {B}]', think="a")),
    Row("look from think into answer", "<think><look>red</think><answer></look></answer>", (1, 0, 0, 1), NONE),
]

REPEATS = [
    Row("placeholder", said(think=THINK + " [your reasoning text]"), (1, 2, 1, 0)),
    Row("placeholder in capitals", said(think=THINK + " YOUR Visual FOCUS"), (1, 2, 1, 0)),
    Row("placeholder over lines", said(think=THINK + " more\n\n\treasoning\u3000text"), (1, 2, 1, 0)),
    Row("placeholder with signs", said(think=THINK + " (your) -- \u201cvisual\u201d, focus!"), (1, 2, 1, 0)),
    Row("placeholder in one word", said(think=THINK + " yourvisualfocus"), (1, 2, 1, 0)),
    Row("placeholder with long s", said(think=THINK + " your vi\u017fual focu\u017f"), (1, 2, 1, 0)),  # IGNORECASE
    Row("placeholder in a label", said(f'[{A[:-1]}, "label": "your visual focus"}}, {B}]'), (1, 2, 1, 0)),
    Row("underscores are letters", said(think=THINK + " your_visual_focus, **your** _reasoning_ text")),
    Row("longer words", said(think=THINK + " your visual focuses, yours visual focus, more reasoning texts")),
    Row(
        "the prompt's example",
        "<think> [your reasoning text] <look> [your visual focus] </look> [more reasoning text] </think>"
        '<answer>[{"bbox_2d": [10,100,200,210], "point_2d": [30,110]}, '
        '{"bbox_2d": [225,296,706,786], "point_2d": [302,410]}]</answer>',
        (1, 2, 1, 0),
        # No threshold is met, so first goes with first. IoU: A in 191 x 111, B in 482 x 491 pixels. Points: sqrt(16000)
        # = 126.4911 and sqrt(23504) = 153.3101 apart, worth 0.432405 and 0.274646.
        (0.256965, 1, 0.353526),
    ),
    Row("one repeat", said(think=THINK + ". One. One. End")),
    Row("two repeats", said(think=THINK + ". One. One. One. End"), (1, 2, 1, 0)),
    Row("two sentences twice", said(think=THINK + ". One. Two! One? Two. End"), (1, 2, 1, 0)),
    Row("tags belong to a sentence", said(think="One. One. One", answer=AB), (1, 2, 0, 1)),
    Row("disguised", said(think=THINK + ". One! \u201cONE\u201d? ( one, )\u2026 End"), (1, 2, 1, 0)),
    Row("Chinese stops", said(think=THINK + "\u3002\u770b\uff01\u770b\uff1f\u770b\u3002 End"), (1, 2, 1, 0)),
    Row("inner blanks", said(think=THINK + ". a  b. A\tb. a\nb. End"), (1, 2, 1, 0)),
    # "a\t," loses its comma after its blanks: "a " is not "a".
    Row("a blank left over", said(think=THINK + ". a. a\t,. a\t;. End")),
    Row("full-width stop is no stop", said(think=THINK + ". One\uff0eOne\uff0eOne\uff0eOne. End")),
    # Sentences end inside decimals: "0, 199" and "0, 499" stand twice.
    Row(
        "decimals",
        said(
            '[{"bbox_2d": [100.0, 100.0, 199.0, 199.0], "point_2d": [150.0, 150.0]}, '
            '{"bbox_2d": [400.0, 400.0, 499.0, 499.0], "point_2d": [450.0, 450.0]}]'
        ),
        (1, 2, 1, 0),
    ),
]

SHAPES = [
    Row("one object alone", said(A), (1, 0, 1, 1), NONE),  # iterates over the keys; the first stops it
    Row("a list in a key", said(f'{{"objects": {AB}}}'), (1, 0, 1, 1), NONE),
    Row("empty list", said("[]"), (1, 0, 1, 1), NONE),
    Row("number", said("7"), (1, 0, 1, 1), NONE),
    Row("null", said("null"), (1, 0, 1, 1), NONE),
    Row("string", said('"bbox_2d"'), (1, 0, 1, 1), NONE),
    Row("single quotes", said(AB.replace('"', "'")), (1, 0, 1, 1), NONE),
    Row("curly quotes", said(AB.replace('"', "\u201d")), (1, 0, 1, 1), NONE),
    Row("fenced", said(f"```json\n{AB}\n```"), (1, 0, 1, 1), NONE),
    Row("comma at the end", said(f"[{A},]"), (1, 0, 1, 1), NONE),
    Row("words in the answer", said(f"Here: {AB}"), (1, 0, 1, 1), NONE),
    Row("cut off", said(AB[:-2]), (1, 0, 1, 1), NONE),
    Row("wide blanks around", said(f"\u3000{AB}\u2003\x1c")),
    Row("zero-width blank", said("\u200b" + AB), (1, 0, 1, 1), NONE),
    Row("a list too many", said(f"[{AB}]"), (1, 0, 1, 1), NONE),
    Row("further keys", said(f'[{A[:-1]}, "label": null}}, {B}]')),
    Row("a key twice", said(f'[{{"bbox_2d": [0], {A[1:]}, {B}]')),  # the last one counts
    Row("one object of two", said(f"[{A}]"), WHOLE_MARKS, (1, 0.5, 1)),
    Row("three objects for two", said(f"[{A}, {B}, {A}]"), WHOLE_MARKS, (1, 2 / 3, 1)),
    Row("point missing", said(f'[{A}, {{"bbox_2d": [400, 400, 499, 499]}}]'), (1, 1.5, 1, 1), NONE),
    Row("box missing", said('[{"point_2d": [150, 150]}]'), (1, 1, 1, 1), NONE),
    Row("empty object", said(f"[{A}, {{}}]"), (1, 1, 1, 1), NONE),
    Row("wrong keys", said('[{"bbox": [100, 100, 199, 199], "point": [150, 150]}]'), (1, 0, 1, 1), NONE),
    Row("a number among them", said(f"[{A}, 5]"), (1, 1, 1, 1), NONE),
    Row("a number first", said(f"[5, {A}]"), (1, 0, 1, 1), NONE),
    Row("a key's name as item", said(f'[{A}, "bbox_2d"]'), (1, 1, 1, 1), NONE),
    Row("null as item", said(f"[{A}, null]"), (1, 1, 1, 1), NONE),
    # 120 are kept, two of them matched: one A with A, another with B, 300 * sqrt(2) pixels away.
    Row("121 objects", said("[" + ", ".join([A] * 121) + "]"), WHOLE_MARKS, (0.5, 1 / 60, 0.5)),
    Row("the right one as 121st", said("[" + ", ".join([*[A] * 120, B]) + "]"), WHOLE_MARKS, (0.5, 1 / 60, 0.5)),
    Row("a bad one as 121st", said("[" + ", ".join([*[A] * 120, "{}"]) + "]"), (1, 240 / 121, 1, 1), NONE),
]

NUMBERS = [
    Row("strings for numbers", one('["100", "1e2", " 199 ", "199"]', '["150", "150"]'), WHOLE_MARKS, (1, 0.5, 1)),
    Row("letters for numbers", one('["a", "b", "c", "d"]'), WHOLE_MARKS, (0, 0.5, 0)),
    Row("full-width digits", one("[\uff11\uff10\uff10, 100, 199, 199]"), (1, 0, 1, 1), NONE),
    Row("leading zeros", one("[0100, 100, 199, 199]"), (1, 0, 1, 1), NONE),
    # Pixels 0..1 x 0..1 of A's corner: not at all. The point is A's, but not in its box; A is the first of equals.
    Row("booleans", one("[false, false, true, true]"), WHOLE_MARKS, (0, 0.5, 1)),
    Row("infinite box", one("[100, 100, Infinity, 199]"), WHOLE_MARKS, (0, 0.5, 1)),
    Row("infinite corner", said(f"[{A.replace('[100, 100', '[Infinity, Infinity')}, {B}]"), WHOLE_MARKS, (0.5, 1, 1)),
    Row("number beyond floats", one("[100, 100, 1e999, 199]"), WHOLE_MARKS, (0, 0.5, 1)),
    Row("infinite point", one(point="[-Infinity, 150]"), WHOLE_MARKS, (1, 0.5, 0)),
    Row("integer beyond floats", one("[100, 100, 1" + "0" * 400 + ", 199]"), WHOLE_MARKS, (0, 0.5, 0)),
    Row("integer of 5,000 digits", one("[100, 100, 1" + "0" * 5000 + ", 199]"), (1, 0, 1, 1), NONE),
    Row("five numbers", one("[100, 100, 199, 199, 0]"), (1, 1, 1, 1), (0, 0.5, 0)),
    Row("three numbers for a point", one(point="[150, 150, 0]"), (1, 1, 1, 1), (0, 0.5, 0)),
    Row("one number for a point", one(point="[150]"), (1, 1, 1, 1), (0, 0.5, 0)),
    Row("no numbers", one("[]", "[]"), (1, 0, 1, 1), (0, 0.5, 0)),
    Row("null for a box", one("null"), (1, 1, 1, 1), (0, 0.5, 0)),
    Row("an object for a box", one('{"x": 1}'), (1, 1, 1, 1), (0, 0.5, 0)),
    Row("text for a box", one('"100 100 199 199"'), (1, 1, 1, 1), (0, 0.5, 0)),
    Row("corners", one("[[100, 100], [199, 199]]"), (1, 1, 1, 1), (0, 0.5, 0)),
    Row("numbers in lists", one("[[100], [100], [199], [199]]"), WHOLE_MARKS, (0, 0.5, 0)),
    # One unusable box takes the other's values with it; the count stands.
    Row("one box of three numbers", said(f"[{A}, {B.replace('[400, ', '[')}]"), (1, 1.5, 1, 1), (0, 1, 0)),
]

GEOMETRY = [
    # 100 x 50 of 100 x 100 pixels: exactly 0.5, which is no hit; the point 50 px off is worth 150 / 170.
    Row(
        "half of B",
        said(f"[{A}, " + '{"bbox_2d": [400, 400, 499, 449], "point_2d": [450, 400]}]'),
        raw=(0.75, 1, 16 / 17),
    ),
    # 95 x 95 = 9025 of 20000 - 9025
    Row("5 px off", one("[105, 105, 204, 204]", "[155, 155]"), raw=(9025 / 10975, 0.5, 1)),
    Row("point 30 px off", one(point="[180, 150]"), raw=(1, 0.5, 1)),
    Row("point 31 px off", one(point="[150, 119]"), raw=(1, 0.5, 169 / 170)),
    Row("point 100 px off", one(point="[210, 230]"), raw=(1, 0.5, 10 / 17)),
    Row("point 200 px off", one(point="[350, 150]"), raw=(1, 0.5, 0)),
    Row("inverted box", one("[199, 199, 100, 100]"), raw=(0, 0.5, 1)),
    Row("box inverted by half a pixel", one("[150, 100, 149.5, 199]"), raw=(0.005, 0.5, 1)),  # half a pixel wide
    Row("box without area", one("[150, 150, 150, 150]"), raw=(0.0001, 0.5, 1)),  # one pixel
    Row("box beyond the image", one("[-100, -100, 199, 199]"), raw=(1 / 9, 0.5, 1)),
    Row("huge box", one("[0, 0, 999999, 999999]"), raw=(1e-8, 0.5, 1)),
    Row("box beyond all floats", one("[-1e308, -1e308, 1e308, 1e308]"), raw=(0, 0.5, 1)),
    Row(
        "points swapped",
        said(f"[{A.replace('150, 150', '450, 450')}, {B.replace('450, 450', '150, 150')}]"),
        raw=(1, 1, 0),
    ),
    # Each overlaps the other's square by a third; all pairs cost 3, so the order decides, and nothing is matched well.
    Row(
        "poor boxes in the wrong order",
        said(
            '[{"bbox_2d": [450, 400, 549, 499], "point_2d": [800, 800]}, '
            '{"bbox_2d": [150, 100, 249, 199], "point_2d": [800, 100]}]'
        ),
        raw=(0, 1, 0),
    ),
]

# The published x1 or x3 turns NaN as a whole; here the pair is worth 0 and the other one stands.
UNDEFINED = [
    Row("null in a box", said(f"[{A.replace('[100', '[null')}, {B}]"), raw=(0.5, 1, 1)),
    Row("NaN in a box", said(f"[{A.replace('[100', '[NaN')}, {B}]"), raw=(0.5, 1, 1)),
    Row("null in a point", said(f"[{A.replace('[150', '[null')}, {B}]"), raw=(1, 1, 0.5)),
    Row(
        "endless and without height",
        said(f"[{A.replace('100, 199, 199', '150, Infinity, 149')}, {B}]"),
        raw=(0.5, 1, 1),
    ),
]

TABLE = TAGS + LOOKS + REPEATS + SHAPES + NUMBERS + GEOMETRY + UNDEFINED


def scored(text: str, truth: Target = TRUTH) -> Case:
    return builders.case(text, truth, side=840)


def values(case: Case, *names: str) -> tuple[float, ...]:
    return tuple(COMPONENTS[name].measure(case) for name in names)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_completion(row: Row) -> None:
    case = scored(row.text)
    assert values(case, *FORMATS) == pytest.approx(row.formats)
    assert values(case, *ACCURACY) == pytest.approx(row.raw, abs=1e-6)


@pytest.mark.parametrize(("text", "raw"), [(said("[]"), (0, 1, 0)), ("nothing", (0, 1, 0)), (said(f"[{A}]"), NONE)])
def test_nothing_to_find(text: str, raw: tuple[float, float, float]) -> None:
    assert values(scored(text, target()), *ACCURACY) == raw


def test_the_truth_is_cut_at_120_objects() -> None:
    many = target(TRUTH.boxes.repeat(65, 0), TRUTH.points.repeat(65, 0))
    # 65 of A and 55 of B remain of 130; 60 right answers to A are matched, 60 of 120.
    case = scored(said("[" + ", ".join([A] * 60) + "]"), many)
    assert values(case, *ACCURACY) == (1, 0.5, 1)


def test_the_preset_measures_what_was_published() -> None:
    config = compose(["recipe=quickstart", "reward=dr_seg"])
    assert set(config.reward.components) == set(FORMATS) and set(config.reward.ranked) == set(ACCURACY)
    assert reward_terms(config.reward).keys() == {*FORMATS, *ACCURACY}


# ---------------------------------------------------------------- the prompt

INLINE = (
    '\nPlease find "{question}" with bboxs and points.'
    "Compare the difference between object(s) and find the most closely matched object(s)."
    "Output the thinking process inside <think>...</think>."
    "Inside this reasoning, you must include one or more <look>...</look> blocks, enclosing the parts of the reasoning "
    "where you pay special attention to certain visual information."
    " Then, output the final answer inside <answer>...</answer>."
    " Output the bbox(es) and point(s) inside the interested object(s) in JSON format."
    " i.e., <think> [your reasoning text] <look> [your visual focus] </look> [more reasoning text] </think><answer>"
    '[{"bbox_2d": [10,100,200,210], "point_2d": [30,110]}, {"bbox_2d": [225,296,706,786], "point_2d": [302,410]}]'
    "</answer>"
)


@cache
def published_tasks() -> dict[str, dict[str, str]]:
    return yaml.safe_load((Path(CONF) / "task" / "dr_seg.yaml").read_text())


@pytest.mark.parametrize("task", ["segment", "ground", "count"])
def test_the_prompt_is_the_published_one(task: str) -> None:
    assert published_tasks()[task]["system"] == "You are a helpful assistant."
    assert published_tasks()[task]["inline"] == INLINE


def test_questions_are_lower_cased_and_lose_their_stops(assets: Path) -> None:
    model = ModelConfig(path=str(assets / "policy"), segmenter="", answer_frame="resized")
    maker = PromptMaker(model, {"segment": TaskConfig(**published_tasks()["segment"])})
    fed = maker.tokenizer.decode(maker.tokens(sample(question="..The LEFT dog, e.g. Rex..."), inline=True))
    assert 'Please find "the left dog, e.g. rex" with bboxs and points.Compare' in fed
