"""How many values a core ranks per second, in the batches a step brings, against a full queue.

    python -m benchmarks.ranking [--rows 256] [--rounds 9] [--seconds 0.3] [--json]

Both sides: the same batches of `rows` metric vectors of three, the same full queue of 2048, the same published rule
(`le`, one decimal); their ranks are compared before anything is timed. Ours: `RankStore.rank` with the settings of
reward=dr_seg and with the default ones. Rival: one value at a time, by `bisect` on a sorted Python list, Python's
`round` to one decimal. Dr. Seg's `drr_module/serve.py` does that with `torch.searchsorted` on a tensor of one value,
behind a socket; the search is timed as well (`torch` in `values_per_s`), the socket is not. All take turns; medians
over the rounds. `peak_kib`: most memory taken at once by a new store that is filled and then ranks one batch.
"""

from __future__ import annotations

import time
import tracemalloc
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import numpy as np
import torch
from omegaconf import OmegaConf

from benchmarks.common import options, print_result
from launch.run.config import CONF
from perception.config import EcdfConfig
from reward_workers.ranking import RankStore

NAMES = ("dr_seg_iou", "dr_seg_count", "dr_seg_points")
QUEUE, BATCHES = 2048, 8
CONFIGS = {
    "dr_seg": EcdfConfig(**OmegaConf.load(CONF / "reward" / "dr_seg.yaml").ecdf),
    "default": EcdfConfig(capacity=QUEUE),
}

Ranker = Callable[[np.ndarray], np.ndarray]


def filled(config: EcdfConfig, queue: np.ndarray) -> RankStore:
    store = RankStore(NAMES, config)
    store.append("segment", queue)
    store.flush()
    return store


def by_bisect(queue: np.ndarray) -> Ranker:
    """One value at a time against sorted Python lists."""
    columns, size = [sorted(column) for column in queue.T.tolist()], len(queue)

    def rank(values: np.ndarray) -> np.ndarray:
        rows = values.tolist()
        return np.array([[round(bisect_right(columns[j], x) / size, 1) for j, x in enumerate(row)] for row in rows])

    return rank


def by_torch(queue: np.ndarray) -> Ranker:
    """One value at a time against sorted tensors."""
    columns, size = torch.from_numpy(queue).T.contiguous().sort(dim=1).values, len(queue)

    def one(column: int, value: float) -> float:
        count = int(torch.searchsorted(columns[column], torch.tensor(value, dtype=torch.float32), right=True))
        return round(count / size, 1)

    def rank(values: np.ndarray) -> np.ndarray:
        return np.array([[one(j, x) for j, x in enumerate(row)] for row in values.tolist()])

    return rank


def rate(rank: Ranker, batches: Sequence[np.ndarray], seconds: float) -> float:
    """Values per second over whole sweeps of the batches that last at least `seconds`."""
    began, done = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < seconds:
        for values in batches:
            rank(values)
            done += values.size
    return done / elapsed


def peak_kib(config: EcdfConfig, queue: np.ndarray, values: np.ndarray) -> float:
    tracemalloc.start()
    try:
        filled(config, queue).rank("segment", values)
        return tracemalloc.get_traced_memory()[1] / 1024
    finally:
        tracemalloc.stop()


def make_sides(queue: np.ndarray) -> dict[str, Ranker]:
    def ours(config: EcdfConfig) -> Ranker:
        store = filled(config, queue)
        return lambda values: store.rank("segment", values)

    stores = {name: ours(config) for name, config in CONFIGS.items()}
    return {**stores, "bisect": by_bisect(queue), "torch": by_torch(queue)}


def check(sides: Mapping[str, Ranker], batches: Sequence[np.ndarray]) -> None:
    """Raises RuntimeError unless both rivals give the published ranks, too."""
    for values in batches:
        expected = sides["dr_seg"](values)
        if not all(np.array_equal(sides[rival](values), expected) for rival in ("bisect", "torch")):
            raise RuntimeError("the rivals rank otherwise than the store: their speeds cannot be compared")


def main() -> None:
    seconds = (0.3, "per side and round")
    arguments = options(__doc__, rows=(256, "metric vectors per batch"), rounds=(9, "of all sides"), seconds=seconds)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    queue = np.round(rng.beta(2, 1, (QUEUE, 3)), 3).astype(np.float32)
    batches = [np.round(rng.beta(2, 1, (arguments.rows, 3)), 3).astype(np.float32) for _ in range(BATCHES)]
    sides = make_sides(queue)
    check(sides, batches)
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(arguments.rounds):
        for side, rank in sides.items():
            rates[side].append(rate(rank, batches, arguments.seconds))
    per_s = {side: round(median(found)) for side, found in rates.items()}
    print_result(
        "ranking",
        {"values_per_s": per_s["dr_seg"]},
        {"values_per_s": per_s["bisect"]},
        round(per_s["dr_seg"] / per_s["bisect"], 2),
        {**vars(arguments), "columns": 3, "queue": QUEUE},
        values_per_s=per_s,
        peak_kib={name: round(peak_kib(config, queue, batches[0]), 1) for name, config in CONFIGS.items()},
    )


if __name__ == "__main__":
    main()
