"""Guards the promise about hostile text: nothing raises, every value is finite, time is linear and memory bounded."""

from __future__ import annotations

import json
import sys
import tracemalloc
import warnings
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.hostile import FAMILIES, TRUTHS, measure, seconds_of
from perception.grammar import LONGEST
from perception.tasks import TASKS
from perception.types import Target
from reward_workers.components import COMPONENTS
from reward_workers.components.dr_seg import published_objects
from tests.builders import case
from tests.hostile_text import COMPLETIONS, FRAGMENTS, NUMBERS, TAGS, run

keys = st.sampled_from(["bbox_2d", "point_2d", "label", "BBOX_2D", ""])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
boxes = st.lists(st.integers(-900, 900) | st.floats() | st.sampled_from(["7", None, True, 10**400]), max_size=5)
objects = st.fixed_dictionaries({"bbox_2d": boxes | values, "point_2d": boxes | values})
bodies = st.lists(objects | values, max_size=4).map(json.dumps)
raw = st.lists(st.sampled_from([*FRAGMENTS, *NUMBERS, *TAGS, *COMPLETIONS]) | st.text(max_size=9), max_size=8).map(
    "".join
)


@settings(max_examples=2000)
@given(
    text=raw | bodies.map(lambda body: f"<think>a</think><answer>{body}</answer>"),
    truth=st.sampled_from(TRUTHS),
    task=st.sampled_from([*TASKS]),
)
@example(text="<answer>" + "[" * 100_000 + "</answer>", truth=TRUTHS[0], task="segment")
@example(
    text='<answer>[{"bbox_2d": [1e308, -1e308, -1e308, 1e308], "point_2d": [1e308, 0]}]</answer>',
    truth=TRUTHS[0],
    task="segment",
)
def test_any_text_is_read_and_measured(text: str, truth: Target, task: str) -> None:
    for worth in measure(text, TASKS[task].parse(text), truth).values():
        assert -1 <= worth <= 3


def test_40_000_mutated_completions() -> None:
    """Two processes, each with its own. Many must still be answers, or the components see none."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for met in pool.map(_run, [1, 2], timeout=900):
            assert met["share_answered"] > 0.2


def _run(seed: int) -> dict[str, float]:
    warnings.simplefilter("error", RuntimeWarning)
    return run(20_000, seed)


@pytest.mark.parametrize("name", FAMILIES)
def test_time_is_linear(name: str) -> None:
    """Ten times the text takes at most 40 times as long: 10 would be linear, 100 quadratic.

    Below a millisecond the clock and the fixed costs count for more than the text.
    """
    took = [seconds_of(FAMILIES[name](size)) for size in (10**4, 10**5, 10**6, 10**7)]
    for shorter, longer in pairwise(took):
        assert longer <= 40 * max(shorter, 1e-3)


GREEDY = ["sentences", "stops", "boxes", "lists", "keys", "nested lists", "half placeholders", "decimals"]


@pytest.mark.parametrize("name", GREEDY)
def test_memory_is_bounded(name: str) -> None:
    """At most six times a text of ten million characters.

    The copies of a body and of its lower case take two; what becomes Python objects, some 40 times its size, is cut at
    the first million characters (`grammar.LONGEST`): four more.
    """
    text = FAMILIES[name](10**7)
    tracemalloc.start()
    try:
        measure(text, TASKS["segment"].parse(text), TRUTHS[0])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * sys.getsizeof(text)


@pytest.mark.parametrize(("beyond", "answered"), [(0, True), (1, False)])
def test_what_is_too_long_is_no_answer(beyond: int, answered: bool) -> None:
    items = '[{"bbox_2d": [10, 20, 110, 130], "point_2d": [60, 75]}'
    text = f"<think>a</think><answer>{items}{' ' * (LONGEST + beyond - len(items) - 1)}]</answer>"
    failure, one = TASKS["segment"].parse(text).failure, case(text)
    assert answered if failure is None else "1,000,000 characters" in failure.detail
    assert COMPONENTS["answer_format"].measure(one) == 2 * answered
    assert len(published_objects(one).boxes) == answered
    assert COMPONENTS["think_format"].measure(one) == 1
