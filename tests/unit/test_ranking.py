"""Guards the distribution-ranked reward: the published numbers, the options, determinism, memory, and its speed."""

from __future__ import annotations

import asyncio
import time
import tracemalloc
from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perception.config import EcdfConfig, RewardConfig
from perception.types import Group
from reward_workers.combine import make_store, rewarded
from reward_workers.ranking import RankStore
from tests.builders import candidate, group, measured, unparsed

DR_SEG = EcdfConfig(
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
    return RankStore(("x",), EcdfConfig(**options))  # type: ignore[arg-type]


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
    config = EcdfConfig(aggregate="mean", warmup=0)
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
    first = RankStore(NAMES, EcdfConfig(capacity=100, warmup=2))
    for _ in range(5):
        first.append("segment", rng.random((30, 3)))
        first.flush()
    second = RankStore(NAMES, EcdfConfig(capacity=100, warmup=2))
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
    store = RankStore(NAMES, EcdfConfig(warmup=0))
    store.append("segment", rng.random((2048, 3)))
    store.flush()
    values = rng.random((100_000, 3))
    started = time.process_time()
    store.rank("segment", values)
    assert values.size / (time.process_time() - started) > 1e6


# ---------------------------------------------------------------- failed samples


def group_of(values: Sequence[float], failed: int) -> Group:
    """One pass each, measured by `x`, which is also its mask IoU; sample number `failed` did not parse."""
    return group(
        *(
            unparsed(candidate(x, failed=True), x=x) if index == failed else measured(x, x=x)
            for index, x in enumerate(values)
        )
    )


def rewards(groups: Sequence[Group], config: RewardConfig, store: RankStore | None) -> list[tuple[float, ...]]:
    done = rewarded(groups, config, store)
    return [tuple(one.reward for one in each.trajectories if one.reward is not None) for each in done]


def test_a_metric_at_which_everyone_fails_gives_half_to_an_answer_and_nothing_to_a_failure() -> None:
    """With the published `le` a zero among zeros has rank 1, as if it were the best ever seen."""
    config = RewardConfig(name="mine", components={}, ranked={"x": 1.0}, rank="ecdf", ecdf=EcdfConfig(warmup=0))
    store = make_store(config)
    assert store is not None
    store.append("segment", np.zeros((2048, 1)))
    store.flush()
    assert filled([0.0] * 2048, ties="le").rank("segment", np.array([[0.0]])).item() == 1.0
    step = [group_of([0.0, 0.0, 0.1], failed=1)]
    assert rewards(step, config, store) == [(0.5, 0.0, 1.0)]


@given(
    history=st.lists(st.sampled_from([0.0, 0.0, 0.25, 1.0]), max_size=30),
    values=st.lists(st.floats(0, 1, width=32), min_size=2, max_size=8),
    ties=st.sampled_from(["le", "mid"]),
    unparsed=st.sampled_from([0.0, None]),
    evidence=st.booleans(),
)
def test_a_failed_sample_is_never_a_lucky_rank(
    history: list[float], values: list[float], ties: Literal["le", "mid"], unparsed: float | None, evidence: bool
) -> None:
    """Its metrics are 0: it never earns more than any parsed sample beside it, and is no evidence by default."""
    ecdf = EcdfConfig(warmup=0, ties=ties, exclude_unparsed=not evidence)
    config = RewardConfig(
        name="mine", components={}, ranked={"x": 1.0}, rank="ecdf", ecdf=ecdf, unparsed_reward=unparsed
    )
    store = make_store(config)
    assert store is not None
    if history:
        store.append("segment", np.array(history)[:, None])
        store.flush()
    [found] = rewards([group_of([0.0, *values], failed=0)], config, store)
    assert found[0] <= min(found[1:])
    store.flush()
    assert len(store.state().rows["segment"]) == len(history) + len(values) + evidence


# ---------------------------------------------------------------- arrival order


async def arriving(groups: Sequence[Group], order: Sequence[int]) -> list[Group]:
    """Scored at the same time and finished in `order`, then put in prompt order as the pipeline does."""
    finished: list[int] = []
    turns = [asyncio.Event() for _ in range(len(order) + 1)]
    turns[0].set()

    async def one(position: int) -> Group:
        turn = order.index(position)
        await turns[turn].wait()
        finished.append(position)
        turns[turn + 1].set()
        return groups[position]

    in_prompt_order = list(await asyncio.gather(*(one(position) for position in range(len(groups)))))
    assert finished == list(order)
    return in_prompt_order


@pytest.mark.parametrize("rank", ["none", "ecdf", "group"])
async def test_rewards_do_not_depend_on_the_order_of_arrival(rank: Literal["none", "ecdf", "group"]) -> None:
    """Seven steps into a queue that is shorter than a step, so that which rows it drops depends on their order."""
    ecdf = EcdfConfig(warmup=1, capacity=20)
    config = RewardConfig(name="mine", components={"x": 0.5}, ranked={"x": 1.0}, rank=rank, ecdf=ecdf)
    rng = np.random.default_rng(3)
    stores = [make_store(config), make_store(config)]
    for _ in range(7):
        groups = [group_of(rng.random(4).tolist(), failed=rng.integers(8)) for _ in range(8)]
        arrived = await arriving(groups, rng.permutation(8).tolist())
        assert rewards(arrived, config, stores[0]) == rewards(groups, config, stores[1])
        for store in stores:
            if store is not None:
                store.flush()
    if rank == "ecdf":
        first, second = (store.state().rows["segment"] for store in stores if store is not None)
        assert first.tolist() == second.tolist()


def test_values_of_one_step_do_not_see_each_other() -> None:
    """Ranks are those of the snapshot: groups of a step may be ranked in any order."""
    rng = np.random.default_rng(4)
    store = filled(rng.random(100).tolist())
    values = rng.random((40, 1))
    together = store.rank("segment", values)
    for row in rng.permutation(40):
        store.append("segment", values[row : row + 1])
        assert store.rank("segment", values[row : row + 1]).item() == together[row, 0]


# ---------------------------------------------------------------- memory


def test_rows_never_exceed_the_capacity() -> None:
    rng = np.random.default_rng(5)
    store = one(capacity=2048)
    seen = np.zeros((0, 1))
    for rows in (1, 700, 2048, 5000, 100, 1947, 3):
        values = rng.random((rows, 1))
        seen = np.concatenate([seen, values])
        store.append("segment", values)
        store.flush()
        kept = store.state().rows["*"]
        assert len(kept) == min(len(seen), 2048)
        assert np.array_equal(kept, seen[-2048:].astype(np.float32))


@pytest.mark.parametrize("step", [1000, 100_000])
def test_a_hundred_thousand_rows_leave_no_more_behind_than_the_queue(step: int) -> None:
    """2048 rows of three float32, kept twice (in order and sorted), and the quantile table: under 100 kB."""
    store = RankStore(NAMES, EcdfConfig(per_task=False))
    values = np.random.default_rng(6).random((step, 3))
    tracemalloc.start()
    try:
        for _ in range(100_000 // step):
            store.append("segment", values)
            store.flush()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(store.state().rows["*"]) == 2048
    assert held < 100_000
