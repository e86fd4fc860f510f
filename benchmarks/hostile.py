"""How long hostile completions take to be read and measured by every reward component: milliseconds of one core.

    python -m benchmarks.hostile [--length 100000] [--json]

Families of adversarial texts, each against one place where a careless reader takes quadratic time; the best of three.
There is no rival. `tests/stack/test_hostile_text.py` puts 40,000 mutated completions through the same functions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np

from benchmarks.common import options, print_result
from perception.frames import Frame
from perception.tasks import TASKS
from perception.types import Answer, Target
from reward_workers.components import COMPONENTS
from tests.builders import case, target, view

FRAME = Frame(480, 640)
VIEW = view(0, 0, 640, 480, 480, 640)


def _answer(body: str) -> str:
    return f"<think>t</think><answer>{body}</answer>"


def _box(number: str) -> str:
    return _answer(f'[{{"bbox_2d": [{number}, 1, 1, 1], "point_2d": [1, 1]}}]')


FAMILIES: dict[str, Callable[[int], str]] = {
    "open think": lambda n: "<think>" * (n // 7),
    "open answers": lambda n: "<think></think>" + "<answer>" * (n // 8),
    "closed think": lambda n: "<think>" + "</think> " * (n // 9) + "</answer>",
    "looks": lambda n: "<think>" + "<look>" * (n // 6) + "</think>",
    "looks and blanks": lambda n: "<think><look>" + " " * n + "</think>",
    "blanks before the answer": lambda n: "<think></think>" + " " * n + "</answer>",
    "blanks in the answer": lambda n: _answer(" " * n + "[]"),
    "half placeholders": lambda n: "your reasoning " * (n // 15),
    "half a placeholder and blanks": lambda n: ("your reasoning" + " " * 5000) * (n // 5014),
    "one sentence again and again": lambda n: "I see it. " * (n // 10),
    "sentences": lambda n: ".".join(f"{i:x}" for i in range(n // 5)),
    "stops": lambda n: "\u3002a\uff01" * (n // 3),
    "white space": lambda n: "a  b\n" * (n // 5),
    "quotes": lambda n: '"' * n + "a" + '"' * n,
    "nested lists": lambda n: _answer("[" * n),
    "nested and closed": lambda n: _answer("[" * (n // 2) + "]" * (n // 2)),
    "nested objects": lambda n: _answer('{"a":' * (n // 5)),
    "digits": lambda n: _box("9" * n),
    "decimals": lambda n: _box("9" * (n // 2) + "." + "9" * (n // 2)),
    "digits in a string": lambda n: _box('"' + "9" * n + '"'),
    "long integers": lambda n: _answer("[" + ("9" * 4300 + ",") * (n // 4301) + "1]"),
    "numbers": lambda n: _box("1," * (n // 2) + "1"),
    "boxes": lambda n: _answer(("[" + '{"bbox_2d": [1, 2, 3, 4], "point_2d": [2, 3]},' * (n // 46))[:-1] + "]"),
    "lists": lambda n: _answer("[" + "[]," * (n // 3) + "1]"),
    "objects": lambda n: _answer("[" + "{}," * (n // 3) + "1]"),
    "keys": lambda n: _answer("{" + ",".join(f'"{i}":0' for i in range(n // 9)) + "}"),
    "escapes": lambda n: _answer('["' + "\\u0041" * (n // 6) + '"]'),
}
"""Text of about so many characters, each against one place where a careless reader takes quadratic time."""


def _truth(count: int) -> Target:
    corner = np.arange(count, dtype=np.float32)[:, None] * 40
    return target(corner + np.array([10, 20, 110, 130]), corner + np.array([60, 75]))


TRUTHS = (_truth(2), _truth(1), _truth(7), _truth(0))
_MASK = np.arange(64).reshape(8, 8) % 5 == 0


def measure(text: str, read: Answer, truth: Target) -> dict[str, float]:
    """Every component's value. Raises ValueError where one is not finite."""
    one = case(text, truth, answer=read, image=FRAME, view=VIEW, masks=lambda: (_MASK.T, _MASK))
    values = {name: COMPONENTS[name].measure(one) for name in COMPONENTS}
    if not all(map(math.isfinite, values.values())):
        raise ValueError(f"not finite: {values} for {text[:200]!r}")
    return values


def seconds_of(text: str, repeats: int = 3) -> float:
    """Processor time of one reading and one measuring, the best of some."""
    took = []
    for _ in range(repeats):
        began = time.process_time()
        measure(text, TASKS["segment"].parse(text), TRUTHS[0])
        took.append(time.process_time() - began)
    return min(took)


def main() -> None:
    arguments = options(__doc__, length=(100_000, "characters of each text"))
    took = {name: round(1000 * seconds_of(make(arguments.length)), 2) for name, make in FAMILIES.items()}
    slowest = max(took, key=took.__getitem__)
    print_result("hostile", {"slowest": slowest, "ms": took[slowest]}, None, None, vars(arguments), families_ms=took)


if __name__ == "__main__":
    main()
