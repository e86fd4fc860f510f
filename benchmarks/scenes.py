"""How fast the synthetic world is drawn, questions included, on one core. There is no rival.

python -m benchmarks.scenes [--side 168] [--count 600] [--json]
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import cv2
import numpy as np

from benchmarks.common import print_result
from perception.scenes import SceneStyle, ask, generate

ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=168)
    parser.add_argument("--count", type=int, default=600, help="scenes per round")
    parser.add_argument("--json", action="store_true", help="one JSON line; there is no other output")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    style = SceneStyle(side=arguments.side)
    rates = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for seed in range(arguments.count):
            ask(generate(seed, style), np.random.default_rng(seed), style)
        rates.append(arguments.count / (time.perf_counter() - began))
    settings = {"side": arguments.side, "count": arguments.count, "rounds": ROUNDS}
    print_result("scenes", {"scenes_per_s": round(median(rates), 1)}, None, None, settings)


if __name__ == "__main__":
    main()
