"""Completions no one would write: real ones, mutated, to be put through the parser and every reward component."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from benchmarks.hostile import TRUTHS, measure
from perception.tasks import TASKS

COMPLETIONS = (
    "<think>I see <look>a red square at the left</look> and a blue circle. The red one is larger. It is the one meant."
    '</think>\n<answer>[{"bbox_2d": [10, 20, 110, 130], "point_2d": [60, 70]}]</answer>',
    "<think>Two dogs. The first lies on the grass; the second runs towards it.</think><answer>"
    '[{"bbox_2d": [12.5, 200, 300, 410.25], "point_2d": [150, 300], "label": "dog"}, '
    '{"bbox_2d": [320, 180, 600, 420], "point_2d": [450, 300], "label": "dog"}]</answer>',
    "<think>There is no such object in the image.</think><answer>[]</answer>",
    '<think></think>\n\n<answer>\n[\n  {"point_2d": [1, 2]},\n  {"point_2d": [300, 4]}\n]\n</answer>',
    '<think>左边的红色方块。它更大！</think><answer>[{"bbox_2d": [0, 0, 1000, 1000], "point_2d": [500, 500]}]</answer>',
    '<think>The dog.</think><answer>{"bbox": [10, 20, 110, 130], "points_1": [60, 70], "points_2": [50, 90]}</answer>',
    "<think>A toad.</think> <bbox>[10,20,110,130]</bbox>, <points>[[60,70],[1,2],[50,90]]</points>, "
    "<labels>[1,0,1]</labels>",
    "<|object_ref_start|>dogs<|object_ref_end|><|box_start|>(10,20),(110,130)<|box_end|><|box_start|>(1,2),(3,4)<|box_end|>",
    '```json\n[{"bbox_2d": [10, 20, 110, 130], "label": "dog"}, {"bbox_2d": [1, 2, 3, 4], "label": "cat"}]\n```',
    "<think> [your reasoning text] <look> [your visual focus] </look> [more reasoning text] </think><answer>"
    '[{"bbox_2d": [10,100,200,210], "point_2d": [30,110]}, {"bbox_2d": [225,296,706,786], "point_2d": [302,410]}]'
    "</answer>",
)
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<look>", "</look>")
NUMBERS = (
    *("1e400", "-1e400", "NaN", "Infinity", "-Infinity", "1e308", "-1e308", "1e-400", "-0", "0.1e1", "1e6", "1000001"),
    *("9" * 400, "9" * 5000, "0" * 50, "0x10", "1_000", "+1", "1.", ".5", "٣٤", "１００", "²", "true", "null"),
    *('"7"', '"nan"', '"1e999"', "[1]", "[]", "{}", '{"bbox_2d": 1}', "[[[1]]]", "2147483648", "9007199254740993"),
)
FRAGMENTS = (
    *TAGS,
    *("<answer>[", "]</answer>", '"bbox_2d"', '"point_2d":', "[[[[", "]]]]", "{{", "}}", ",,", '\\"', "\\u0000"),
    *("\x00", "\x1b[0m", "\u2028", "\u202e", "\ufeff", "\u200b", "\ud800", "\udfff", "\\ud800", "𝟙", "e\u0301", "İ"),
    *("...", "。。", "?!", "Same. Same. Same. ", "your reasoning text", "your \n visual-focus", "more ", "```json"),
    *(" " * 300, "\t\n" * 100, "<" * 100, "[" * 1200, '{"a":' * 1200, "[" * 300 + "]" * 300, "<look>" * 50),
)
CONTROL = tuple(map(chr, (*range(32), 127, 133, 160, 0x3000, 0xD83D, 0xFFFF)))
OTHER_DIGITS = ("٠١٢٣٤٥٦٧٨٩", "０１２３４５６７８９", "०१२३४५६७८९")
Draw = random.Random


def completions(count: int, seed: int) -> Iterator[str]:
    """Completions, each mutated one to five times; one in four grows out of the one before."""
    draw, text = Draw(seed), COMPLETIONS[0]
    for _ in range(count):
        if draw.random() < 0.75 or len(text) > 20_000:
            text = draw.choice(COMPLETIONS)
        for _ in range(draw.randint(1, 5)):
            text = draw.choices(MUTATIONS, WEIGHTS)[0](text, draw)
        yield text


def _span(text: str, draw: Draw) -> tuple[int, int]:
    start = draw.randint(0, len(text))
    return start, min(len(text), start + draw.choice((1, 3, 10, 40, 200)))


def _delete(text: str, draw: Draw) -> str:
    start, end = _span(text, draw)
    return text[:start] + text[end:]


def _duplicate(text: str, draw: Draw) -> str:
    start, end = _span(text, draw)
    return text[:start] + text[start:end] * draw.choice((2, 3, 20)) + text[end:]


def _splice(text: str, draw: Draw) -> str:
    other = draw.choice(COMPLETIONS)
    return text[: draw.randint(0, len(text))] + other[draw.randint(0, len(other)) :]


def _swap_tags(text: str, draw: Draw) -> str:
    return text.replace(draw.choice(TAGS), draw.choice((*TAGS, "", "< think>", "<ANSWER>")), draw.choice((1, 9)))


def _insert(text: str, draw: Draw) -> str:
    at = draw.randint(0, len(text))
    return text[:at] + draw.choice(FRAGMENTS) + text[at:]


def _number(text: str, draw: Draw) -> str:
    """Another value where a number stands, if there is one after a random place."""
    at = draw.randint(0, len(text))
    start = next((i for i in range(at, min(len(text), at + 60)) if text[i] in "0123456789"), -1)
    if start < 0:
        return text
    end = next((i for i in range(start, len(text)) if text[i] not in "0123456789.eE+-"), len(text))
    return text[:start] + draw.choice(NUMBERS) + text[end:]


def _control(text: str, draw: Draw) -> str:
    at = draw.randint(0, len(text))
    return text[:at] + draw.choice(CONTROL) + text[at + 1 :]


def _digits(text: str, draw: Draw) -> str:
    return text.translate(str.maketrans("0123456789", draw.choice(OTHER_DIGITS)))


def _many(text: str, draw: Draw) -> str:
    """Up to thousands of boxes in the answer."""
    count = draw.choice((119, 121, 300, 3000))
    item = f'{{"bbox_2d": [{draw.randint(-9, 640)}, 0, {draw.randint(0, 999)}, 480], "point_2d": [5, 5]}}, '
    return text.replace("<answer>[", "<answer>[" + item * count, 1)


MUTATIONS: tuple[Callable[[str, Draw], str], ...] = (
    *(_delete, _duplicate, _splice, _swap_tags, _insert, _number, _control, _digits, _many),
)
WEIGHTS = (20, 10, 10, 10, 15, 40, 10, 2, 0.3)


def run(count: int, seed: int) -> dict[str, float]:
    """Read so many completions for every task and measure the first that finds objects by every component; counts."""
    characters, answered = 0, 0
    for index, text in enumerate(completions(count, seed)):
        reads = [TASKS[task].parse(text) for task in ("segment", *TASKS)]
        read = next((one for one in reads if one.objects), reads[0])
        measure(text, read, TRUTHS[index % len(TRUTHS)])
        characters, answered = characters + len(text), answered + (read.failure is None)
    return {"mean_characters": round(characters / count), "share_answered": round(answered / count, 3)}
