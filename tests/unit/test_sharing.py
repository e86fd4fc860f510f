"""Guards what may share a GPU: NCCL's members never do, colocated actors do by pairs, who take turns only there."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import combinations
from typing import Any, Literal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from launch.run import memory
from launch.run.config import compose
from perception.config import (
    Config,
    LearnerConfig,
    LoraConfig,
    ModelConfig,
    PipelineConfig,
    PlacementConfig,
    RewardConfig,
    RolloutConfig,
)
from perception.errors import UserError
from runtime import placement
from runtime.placement import check_resources
from tests import builders

SHARES = st.sampled_from([0.1, 0.25, 0.3, 0.45, 0.5, 0.51, 0.7, 1.0, 2.0])
COUNTS = st.integers(1, 4)


@pytest.fixture(autouse=True)
def large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "cluster_address", lambda: None)
    monkeypatch.setattr(placement, "local_gpus", lambda: 64)
    monkeypatch.setattr(placement, "cpus", lambda: 64)


def shared(
    transport: Literal["store", "ipc", "nccl", "gloo"],
    shares: tuple[float, float, float],
    counts: tuple[int, int, int] = (1, 1, 1),
    staleness: int = 0,
    **where: Any,
) -> Config:
    """`shares` and `counts` of engines, reward workers and learner ranks."""
    gpus = dict(zip(("engine_gpus", "reward_gpus", "learner_gpus"), shares, strict=True))
    return builders.config(
        rollout=RolloutConfig(engines=counts[0]),
        reward=RewardConfig(name="test", components={"parsed": 1.0}, workers=counts[1]),
        learner=LearnerConfig(ranks=counts[2]),
        pipeline=PipelineConfig(max_staleness=staleness),
        placement=PlacementConfig(**{"name": "test", "device": "cuda", "transport": transport} | gpus | where),
    )


def refusal(config: Config) -> str:
    """The line by which it is refused; empty where it is not."""
    try:
        check_resources(config)
    except UserError as refused:
        return str(refused)
    return ""


def may_meet(members: list[float]) -> bool:
    """Ray fills a GPU with fractions as long as they add up to no more than it; a share of one or more is whole."""
    return any(one < 1 and other < 1 and one + other <= 1 for one, other in combinations(members, 2))


@given(st.sampled_from(["nccl", "store", "gloo"]), SHARES, SHARES, SHARES, COUNTS, COUNTS)
def test_no_two_members_of_an_nccl_group_may_land_on_one_gpu(
    transport: Any, engine: float, reward: float, rank: float, engines: int, ranks: int
) -> None:
    wire = [engine] * engines + [rank] if transport == "nccl" else []  # learner rank 0 alone broadcasts
    line = refusal(shared(transport, (engine, reward, rank), (engines, 1, ranks)))
    assert bool(line) is (may_meet(wire) or may_meet([rank] * ranks))
    if line:
        assert "whole GPUs" in line and "placement.transport=ipc" in line


@given(SHARES, SHARES, SHARES, COUNTS, st.integers(1, 6), COUNTS)
def test_colocated_pairs_share_a_gpu_with_their_reward_workers_and_fill_no_more_than_it(
    engine: float, reward: float, rank: float, engines: int, workers: int, ranks: int
) -> None:
    assume(engine <= 1 and rank <= 1)
    config = shared("ipc", (engine, reward, rank), (engines, workers, ranks))
    line = refusal(config)
    if engines != ranks:
        assert f"ranks={ranks} and engines={engines}" in line
        return
    fullest = -(-workers // engines)
    assert bool(line) is (round(engine + rank + fullest * reward, 6) > 1)
    assert ("add up to" in line) is bool(line)
    bundles = placement._bundles(config)
    assert [Counter(role for role, _ in one)["engine"] for one in bundles] == [1] * engines
    assert [Counter(role for role, _ in one)["learner"] for one in bundles] == [1] * engines
    dealt = [len(one) - 2 for one in bundles]
    assert sum(dealt) == workers and max(dealt) - min(dealt) <= 1
    if not line:
        assert [one["GPU"] for one in placement._asked(config)] == [1.0] * engines


@pytest.mark.parametrize("transport", ["ipc", "nccl"])
def test_weights_do_not_go_from_gpu_to_gpu_on_a_cpu(transport: Any) -> None:
    line = refusal(shared(transport, (0.0, 0.0, 0.0), device="cpu"))
    assert line.startswith(f"placement.transport={transport} needs placement.device=cuda")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("transport", ["ipc", "store", "gloo"])
@pytest.mark.parametrize("staleness", [0, 1])
def test_turns_are_taken_on_shared_gpus_by_a_loop_that_waits_and_nowhere_else(
    device: Any, transport: Any, staleness: int
) -> None:
    share = 0.3 if device == "cuda" else 0.0
    line = refusal(shared(transport, (share,) * 3, staleness=staleness, device=device, sleep=True))
    if transport == "ipc" and device == "cpu":
        assert "needs placement.device=cuda" in line
        return
    missing = [("device=cuda", device == "cpu"), ("transport=ipc", transport != "ipc"), ("staleness=0", staleness > 0)]
    assert bool(line) is any(is_so for _, is_so in missing)
    for what, is_so in missing if line else []:
        assert (what in line) is is_so
    assert not line or line.startswith("placement.sleep=true")


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_placement_colocated_takes_as_many_gpus_as_there_are_pairs(gpus: int) -> None:
    several = (f"rollout.engines={gpus}", f"learner.ranks={gpus}", f"reward.workers={gpus}")
    config = compose(["recipe=quickstart", "placement=colocated", *several])
    assert refusal(config) == ""
    assert placement._total(placement._asked(config))["GPU"] == gpus
    assert (config.placement.sleep, config.model.dtype) == (True, "bfloat16")


# ---------------------------------------------------------------- memory


@cache
def size_3b(learner: LearnerConfig) -> memory.Size:
    return memory.measure(ModelConfig(path="absent", segmenter="", shape="3b"), learner)


def test_who_sleeps_leaves_the_gpu_to_the_other_and_lies_on_the_host() -> None:
    """3.755 B parameters: 7.0 GiB in bfloat16, 42.0 GiB of float32 masters and moments over the ranks."""
    pairs = ("rollout.engines=2", "learner.ranks=2", "reward.workers=2")
    config = compose(["recipe=quickstart", "placement=colocated", *pairs])
    size = size_3b(LearnerConfig())
    found = memory.rooms(size, config, memory.Machine(gpu=80.0, host=100.0, disk=100.0))
    at_work, away, *_ = found
    assert [room.name.rpartition(", ")[2] for room in (at_work, away)] == ["engine asleep", "learner asleep"]
    assert at_work.needs["learner"] == memory.learner(size, config)
    assert set(at_work.needs["engine"]) == {"context"}
    assert away.needs["learner"] == pytest.approx({"weights": 6.99, "context": 0.5}, abs=0.01)
    assert away.needs["engine"] == memory.engine(size, config, 80.0)
    assert not any("learner_gpus" in room.name for room in found), "in its turn the learner has no limit"
    assert memory.host(size, config)["asleep"] == pytest.approx(2 * 6.99 + 41.96, abs=0.02)


@pytest.mark.parametrize(
    ("learner", "gib"),
    [
        (LearnerConfig(zero_stage=1), 0.0),
        (LearnerConfig(zero_stage=2), 0.0),
        (LearnerConfig(zero_stage=3), 6.99),
        (LearnerConfig(lora=LoraConfig(rank=8)), 5.17),  # 36 layers of 77.1 M weights in linear maps
    ],
)
def test_weights_are_copied_for_an_engine_only_where_they_are_not_whole(learner: LearnerConfig, gib: float) -> None:
    config = replace(compose(["recipe=quickstart", "placement=one_gpu"]), learner=learner)
    assert memory.learner(size_3b(learner), config).get("weight sync", 0.0) == pytest.approx(gib, abs=0.01)
