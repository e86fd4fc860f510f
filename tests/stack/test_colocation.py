"""Guards where colocated actors sit: real Ray, told of GPUs that are not there, gives a bundle's actors one GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import ray

from launch.run.config import compose
from perception.config import Config
from runtime import placement

pytestmark = pytest.mark.own_ray

GPUS, WORKERS = 2, 3


@pytest.fixture(scope="module")
def invented_gpus() -> Iterator[None]:
    ids = ",".join(map(str, range(GPUS + 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", ids)
        ray.init(num_cpus=4, num_gpus=GPUS + 1, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
        yield
        ray.shutdown()


def colocated() -> Config:
    """Two pairs and three reward workers; by their shares a GPU would hold two engines, two ranks and a worker."""
    several = (f"rollout.engines={GPUS}", f"learner.ranks={GPUS}", f"reward.workers={WORKERS}")
    shares = ("placement.engine_gpus=0.25", "placement.learner_gpus=0.2")
    config = compose(["recipe=quickstart", "placement=colocated", *several, *shares])
    light = {f"{role}_cpus": 0.5 for role in placement.ROLES}
    return replace(config, placement=replace(config.placement, **light))


class Seated:
    def gpu(self) -> list[int]:
        return list(map(int, ray.get_gpu_ids()))


def test_engine_rank_and_their_reward_workers_get_one_gpu_that_no_other_pair_has(invented_gpus: None) -> None:
    reservation = placement.reserve(colocated())
    assert reservation.placement_group.bundle_specs == [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 1.5, "GPU": 1.0}]
    actors = {
        role: [ray.remote(Seated).options(**seat.options()).remote() for seat in reservation.seats[role]]
        for role in placement.ROLES
    }
    on = {role: [ray.get(one.gpu.remote(), timeout=60) for one in own] for role, own in actors.items()}
    assert all(len(gpu) == 1 for own in on.values() for gpu in own)
    assert on["engine"] == on["learner"] and on["engine"][0] != on["engine"][1]
    assert sorted(Counter(gpu for (gpu,) in on["reward"]).values()) == [1, 2]
    assert {gpu for (gpu,) in on["reward"]} == {gpu for (gpu,) in on["engine"]}
    reservation.free()
