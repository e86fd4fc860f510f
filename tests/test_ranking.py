"""Guards the distribution-ranked reward: the published numbers, the options, determinism, and its speed."""

from __future__ import annotations

import time
from bisect import bisect_right

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perception.config import RankConfig
from reward_workers.ranking import RankStore

DR_SEG = RankConfig(
    capacity=2048,
    initial_zero_rows=128,
    ties="le",
    digits=1,
    aggregate="sum",
    warmup=0,
    exclude_unparsed=False,
    per_task=False,
)
NAMES = ("matched_iou", "count_ratio", "point_score")


def one(**changes: object) -> RankStore:
    options: dict[str, object] = {"warmup": 0, "per_task": False, **changes}
    return RankStore(("x",), RankConfig(**options))  # type: ignore[arg-type]


def filled(values: list[float], **changes: object) -> RankStore:
    store = one(**changes)
    store.append("segment", np.array(values)[:, None])
    store.flush()
    return store


def test_dr_seg_first_step_gives_everyone_three() -> None:
    store = RankStore(NAMES, DR_SEG)
    ranks = store.rank("segment", np.array([[0, 0, 0], [0.9, 1, 1]]))
    assert ranks.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert store.aggregate(ranks, (1, 1, 1)).tolist() == [3, 3]


def test_dr_seg_second_step_by_hand() -> None:
    # 128 zeros and 128 new rows: x = 0.25, 0.5, 0.75, 1.0, 32 times each. 256 rows in all.
    store = RankStore(NAMES, DR_SEG)
    store.append("segment", np.repeat([[0.25] * 3, [0.5] * 3, [0.75] * 3, [1.0] * 3], 32, axis=0))
    assert store.rank("segment", np.zeros((1, 3))).tolist() == [[1, 1, 1]]  # not flushed yet: still frozen
    store.flush()
    # 0 -> 128/256 = .5; .25 -> 160/256 = .625; .5 -> .75, which Python rounds to .8; .75 -> .875; 1 -> 1; .3 as .25
    ranks = store.rank("segment", np.array([[0, 0.25, 0.5], [0.75, 1.0, 0.3]]))
    assert ranks.tolist() == [[0.5, 0.6, 0.8], [0.9, 1.0, 0.6]]


def test_dr_seg_against_a_plain_reimplementation() -> None:
    """Thirty steps of 128 rollouts, so that the queue overflows: lists, bisect and round, one value at a time."""
    rng = np.random.default_rng(0)
    store, queue = RankStore(NAMES, DR_SEG), [[0.0] * 3 for _ in range(128)]
    for _ in range(30):
        values = np.round(rng.beta(2, 1, (128, 3)), 2).astype(np.float32)
        columns = [sorted(row[j] for row in queue) for j in range(3)]
        expected = [[round(bisect_right(columns[j], row[j]) / len(queue), 1) for j in range(3)] for row in values]
        assert store.rank("count", values).tolist() == expected
        store.append("count", values)
        store.flush()
        queue = [*queue, *values.tolist()][-2048:]


def test_rounding_is_pythons() -> None:
    store = filled([0.1] * 3 + [0.5] * 17, digits=1, ties="le")
    assert store.rank("segment", np.array([[0.1]])).item() == 0.1  # 3/20 = 0.15 is a little less than 0.15


def test_middle_rank_splits_ties() -> None:
    store = filled([0.0, 0.0, 1.0, 1.0], ties="mid")
    assert store.rank("segment", np.array([[0.0], [0.5], [1.0]])).ravel().tolist() == [0.25, 0.5, 0.75]


def test_capacity_drops_the_oldest() -> None:
    store = filled([0.1, 0.2, 0.3, 0.4], capacity=2, ties="le")
    assert store.state().rows["*"].ravel().tolist() == pytest.approx([0.3, 0.4])
    assert store.rank("segment", np.array([[0.2], [0.3]])).ravel().tolist() == [0.0, 0.5]


def test_mean_and_weights() -> None:
    config = RankConfig(aggregate="mean", warmup=0)
    ranks = np.array([[0.2, 0.4]])
    assert RankStore(("a", "b"), config).aggregate(ranks, (1, 2)).item() == pytest.approx(0.5)


def test_warmup_counts_steps_and_returns_raw_values() -> None:
    store = one(warmup=2)
    for step in range(2):
        assert store.rank("segment", np.array([[0.3]])).item() == pytest.approx(0.3), step
        store.append("segment", np.array([[0.1], [0.2]]))
        store.flush()
    assert store.rank("segment", np.array([[0.3]])).item() == 1.0


def test_tasks_have_their_own_distributions() -> None:
    store = one(per_task=True, ties="le")
    store.append("segment", np.array([[0.9]]))
    store.append("count", np.array([[0.1]]))
    store.flush()
    assert store.rank("segment", np.array([[0.5]])).item() == 0.0
    assert store.rank("count", np.array([[0.5]])).item() == 1.0


@pytest.mark.parametrize("bad", [np.zeros((2, 2)), np.zeros(2), np.array([[np.nan]])])
def test_wrong_shapes_and_values_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError):
        one().append("segment", bad)


def test_restored_store_goes_on_bit_for_bit() -> None:
    rng = np.random.default_rng(1)
    first = RankStore(NAMES, RankConfig(capacity=100, warmup=2))
    for _ in range(5):
        first.append("segment", rng.random((30, 3)))
        first.flush()
    second = RankStore(NAMES, RankConfig(capacity=100, warmup=2))
    second.restore(first.state())
    values = rng.random((50, 3))
    assert (first.rank("segment", values) == second.rank("segment", values)).all()
    with pytest.raises(ValueError, match="ranks"):
        one().restore(first.state())


def test_an_unfinished_step_is_not_checkpointed() -> None:
    store = one()
    store.append("segment", np.array([[0.5]]))
    with pytest.raises(RuntimeError, match="flush"):
        store.state()


@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60),
    st.lists(st.floats(0, 1, width=32), min_size=2, max_size=20),
    st.sampled_from(["le", "mid"]),
    st.sampled_from([None, 1, 2]),
)
def test_ranks_are_monotone_quantiles(history: list[float], values: list[float], ties: str, digits: int | None) -> None:
    store = filled(history, ties=ties, digits=digits)
    ordered = np.sort(np.array(values))[:, None]
    ranks = store.rank("segment", ordered).ravel()
    assert ((ranks >= 0) & (ranks <= 1)).all() and (np.diff(ranks) >= 0).all()


def test_a_million_values_a_second() -> None:
    rng = np.random.default_rng(0)
    store = RankStore(NAMES, RankConfig(warmup=0))
    store.append("segment", rng.random((2048, 3)))
    store.flush()
    values = rng.random((100_000, 3))
    started = time.process_time()
    store.rank("segment", values)
    assert values.size / (time.process_time() - started) > 1e6
