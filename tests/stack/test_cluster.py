"""Guards where a run executes: submitted to a real two-node Ray cluster it joins it and is spread over it as reserved;
without a cluster it starts its own; what cannot fit is refused in one line before anything starts."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from safetensors.numpy import load_file

from launch.run import nodes
from perception.config import AlgorithmConfig, Config, LearnerConfig, PlacementConfig
from perception.errors import UserError
from runtime import cluster, placement
from tests import builders, plugin_run
from tests.listeners import listeners, outside
from tests.ray_cluster import RayCluster, two_nodes

pytestmark = [pytest.mark.own_ray, pytest.mark.timeout(660)]  # starting two raylets counts towards the first test

HALF = PlacementConfig(name="cpu", device="cpu", engine_cpus=0.5, reward_cpus=0.5, learner_cpus=0.5)


def settings(where: PlacementConfig = HALF, ranks: int = 2) -> Config:
    """One engine, one reward worker and `ranks` learner ranks."""
    return builders.config(
        algorithm=AlgorithmConfig(steps=1, prompts_per_step=2, group_size=2),
        learner=LearnerConfig(ranks=ranks),
        placement=where,
    )


@pytest.fixture(scope="module")
def raylets() -> Iterator[RayCluster]:
    with two_nodes(cpus=(1, 1)) as running:
        yield running


@pytest.fixture
def joined(raylets: RayCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_ADDRESS", raylets.address)
    cluster.connect(HALF)
    yield
    ray.shutdown()


def test_a_submitted_program_joins_the_cluster_with_the_repository_on_every_node(raylets: RayCluster) -> None:
    program = "; ".join(  # in single quotes: the shell has the double ones
        [
            "import ray",
            "from runtime import cluster",
            "from perception.config import PlacementConfig",
            "cluster.connect(PlacementConfig(name='cpu', device='cpu'))",
            "where = lambda: (__import__('perception').__path__[0], ray.get_runtime_context().get_node_id())",
            "task = ray.remote(num_cpus=1, scheduling_strategy='SPREAD')(where)",
            "seen = ray.get([task.remote() for _ in range(4)], timeout=60)",
            "print('nodes', len(ray.nodes()), 'cpus', ray.cluster_resources()['CPU'], 'uploaded', "
            "all('working_dir_files' in path for path, _ in seen), 'job', *cluster.submitted())",
        ]
    )
    job = raylets.submit("python", "-c", program, timeout_s=120)
    assert job.returncode == 0, job.stdout + job.stderr
    assert "nodes 2 cpus 2.0 uploaded True job working_dir" in job.stdout


def test_a_run_with_a_package_from_elsewhere_is_submitted_as_a_job(raylets: RayCluster, tmp_path: Path) -> None:
    """It brings task, component, reader and loss, and writes where it was told; no file of this repository changes."""
    job = raylets.submit("python", *plugin_run.arguments(tmp_path), timeout_s=400)
    assert job.returncode == 0, job.stdout + job.stderr
    run = tmp_path / "runs" / "mine"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2]
    for row in metrics:
        assert 0 < row["component/centre_distance"] <= 1 and 0 <= row["component/box_iou"] <= 1
        expected = 2 * row["component/centre_distance"] + row["component/box_iou"]  # every answer was measured
        assert abs(row["reward/mean"] - expected) < 1e-9
        assert row["policy/clip_low"] == row["policy/clip_high"] == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2
    measured = {"corners/box_accuracy/greedy", "corners/centre_distance/sampled", "corners/samples/sampled"}
    assert measured <= summary["after"].keys()
    assert (run / "report.html").stat().st_size > 0
    before, trained = (
        load_file(folder / "model.safetensors") for folder in (cluster.ROOT / "assets/policy", run / "policy")
    )
    assert np.mean([not np.array_equal(before[name], trained[name]) for name in before]) > 0.9


def test_both_nodes_listen_on_loopback_only(raylets: RayCluster) -> None:
    found = listeners()
    assert sum("/raylet " in one[0] for one in found) >= 2
    assert outside(found) == set()


def bundles(reservation: placement.Reservation) -> tuple[list[int], ...]:
    """The bundles of engines, reward workers and learner ranks."""
    roles = [reservation.seats[role] for role in placement.ROLES]
    assert all(seat.placement_group == reservation.placement_group for role in roles for seat in role)
    return tuple([seat.bundle for seat in role] for role in roles)


def test_a_reservation_spreads_over_the_nodes_and_is_given_back(joined: None) -> None:
    reservation = placement.reserve(settings())
    engine, reward, learner = bundles(reservation)
    assert sorted([*engine, *reward, *learner]) == [0, 1, 2, 3]
    assert all((seat.cpus, seat.gpus) == (0.5, 0.0) for seat in reservation.seats["engine"])
    placed = ray.util.placement_group_table(reservation.placement_group)["bundles_to_node_id"]
    assert len(reservation.nodes) == 2  # four halves do not fit on a node of one CPU
    assert {placed[bundle] for bundle in learner} | {
        placed[bundle] for bundle in [*engine, *reward]
    } == reservation.nodes
    assert len({placed[bundle] for bundle in learner}) == 1
    with pytest.raises(UserError, match=r"asks for 2 CPUs, the cluster has 2 CPUs \(0 CPUs free\)"):
        placement.reserve(settings(dataclasses.replace(HALF, start_timeout_s=0.5)))
    reservation.free()
    placement.reserve(settings(dataclasses.replace(HALF, start_timeout_s=30.0))).free()


def test_a_worker_on_cuda_has_its_share_of_the_cores_as_threads(joined: None) -> None:
    """Ray would give it one thread, and a host's AdamW would run on that."""
    reservation = placement.reserve(settings(dataclasses.replace(HALF, device="cuda"), ranks=1))
    threads = [seat.threads for seats in reservation.seats.values() for seat in seats]
    assert threads == [1, 1, 1]  # nodes of one core
    seat = reservation.seats["learner"][0]._replace(threads=3)
    environment = ray.remote(lambda: dict(os.environ)).options(**seat.options()).remote()
    seen = ray.get(environment, timeout=60)
    assert seen["OMP_NUM_THREADS"] == "3"
    assert seen["PYTHONPATH"].split(os.pathsep)[0] == str(cluster.ROOT)  # the rest of the environment is as it was
    reservation.free()


def test_every_node_must_see_the_files_of_a_run(joined: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [node["NodeID"] for node in ray.nodes()]
    models = {
        "model.path": str(cluster.ROOT / "assets/policy"),
        "model.segmenter": str(cluster.ROOT / "assets/segmenter"),
    }
    nodes.check_nodes(both, models, tmp_path, 60.0)
    assert not list(tmp_path.iterdir())
    folder = os.open(tmp_path, os.O_RDONLY)
    here_only = {"model.segmenter": f"/proc/self/fd/{folder}"}  # another file, or none, in any other process
    assert Path(here_only["model.segmenter"]).exists()
    with pytest.raises(
        UserError, match=rf"node \S+ \(127\.0\.0\.1\) does not see model\.segmenter=/proc/self/fd/{folder}: "
    ):
        nodes.check_nodes(both, models | here_only, tmp_path, 60.0)
    os.close(folder)

    def on_one(wanted: dict[str, str]) -> list[str]:  # as a machine would that shares no file system
        return [] if ray.get_runtime_context().get_node_id() == both[0] else [f"run.output={wanted['run.output']}"]

    monkeypatch.setattr(nodes, "unseen", on_one)
    nodes.check_nodes(both[:1], models, tmp_path, 60.0)
    with pytest.raises(UserError, match=rf"does not see run\.output={tmp_path}/\.token-"):
        nodes.check_nodes(both, models, tmp_path, 60.0)
    monkeypatch.setattr(nodes, "unseen", lambda wanted: time.sleep(60))
    with pytest.raises(
        UserError, match=r"did not say within 0\.5 s \(placement\.start_timeout_s\) whether it sees model\.p"
    ):
        nodes.check_nodes(both, models, None, 0.5)


def test_a_shared_bundle_seats_everyone_together(joined: None) -> None:
    third = dataclasses.replace(HALF, engine_cpus=0.3, reward_cpus=0.3, learner_cpus=0.3, transport="ipc")
    reservation = placement.reserve(settings(third, ranks=1))
    assert bundles(reservation) == ([0], [0], [0])
    assert reservation.placement_group.bundle_specs == [{"CPU": 0.9}]
    reservation.free()


def test_what_the_cluster_can_never_hold_is_refused_in_one_line(joined: None) -> None:
    with pytest.raises(UserError) as refused:
        placement.reserve(settings(dataclasses.replace(HALF, engine_cpus=7, start_timeout_s=0.5)))
    assert str(refused.value).startswith("placement=cpu asks for 8.5 CPUs, the cluster has 2 CPUs")
    assert "\n" not in str(refused.value)


def test_without_a_cluster_a_local_one_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster.connect(dataclasses.replace(HALF, threads=3))
    try:
        environment = ray.remote(num_cpus=0.1)(lambda: dict(os.environ)).remote()
        seen = ray.get(environment, timeout=60)
        assert (seen["OMP_NUM_THREADS"], seen["HF_HUB_OFFLINE"]) == ("3", "1")
        assert seen["PYTHONPATH"].split(os.pathsep)[0] == str(cluster.ROOT)
        assert ray.cluster_resources()["CPU"] == len(os.sched_getaffinity(0))
    finally:
        ray.shutdown()


@pytest.mark.parametrize(
    ("where", "ranks", "message"),
    [
        (dataclasses.replace(HALF, learner_cpus=1.0), 1000, r"asks for 1001 CPUs, this machine has \d+ CPUs"),
        (dataclasses.replace(HALF, name="one_gpu", device="cuda", engine_gpus=0.5), 1, "needs a CUDA GPU"),
        (dataclasses.replace(HALF, engine_gpus=0.5), 1, "placement.device=cpu asks for GPU shares"),
        (dataclasses.replace(HALF, reward_cpus=0.0), 1, "placement.reward_cpus and placement.reward_gpus are both 0"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(
    where: PlacementConfig, ranks: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=message):
        placement.check_resources(settings(where, ranks))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere"])
def test_a_cluster_that_is_not_there_is_named_at_once(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"RAY_ADDRESS={address}"):
        cluster.connect(HALF)
