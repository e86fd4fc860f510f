"""How fast the synthetic world is drawn, questions included, on one core. There is no rival.

python -m benchmarks.scenes [--side 168] [--count 600] [--json]
"""

from __future__ import annotations

import time
from statistics import median

import cv2
import numpy as np

from benchmarks.common import options, print_result
from synthetic.scenes import SceneStyle, ask, generate

ROUNDS = 5


def main() -> None:
    arguments = options(__doc__, side=(168, "pixels"), count=(600, "scenes per round"))
    cv2.setNumThreads(1)
    style = SceneStyle(side=arguments.side)
    rates = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for seed in range(arguments.count):
            ask(generate(seed, style), np.random.default_rng(seed), style)
        rates.append(arguments.count / (time.perf_counter() - began))
    settings = {**vars(arguments), "rounds": ROUNDS}
    print_result("scenes", {"scenes_per_s": round(median(rates), 1)}, None, None, settings)


if __name__ == "__main__":
    main()
