"""Guards what a run takes of its nodes: learner ranks together, threads by the node's cores, a store by its memory, and
output that outlives the job."""

from __future__ import annotations

import json
from itertools import combinations, groupby
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.run.nodes import check_kept, unseen
from perception.errors import UserError
from runtime import machine
from runtime.cluster import object_store_bytes
from runtime.placement import Resources, fair_threads, gathered

GIB = 1 << 30
ONE_GPU, HALF = {"CPU": 1.0, "GPU": 1.0}, {"CPU": 0.5, "GPU": 0.0}


def placed(planned: list[Resources], ranks: list[int], nodes: list[str]) -> list[str]:
    """The node of each rank; the plan is kept whole."""
    place = gathered(planned, ranks, nodes)
    assert sorted(place) == list(range(len(planned)))
    assert all(planned[bundle] == one for one, bundle in zip(planned, place, strict=True))
    return [nodes[place[rank]] for rank in ranks]


@pytest.mark.parametrize(
    ("nodes", "ranks", "on"),
    [
        ("aabb", [2, 3], "aa"),  # nothing to choose
        ("abab", [2, 3], "aa"),
        ("abbab", [3, 4], "bb"),
        ("abcabcab", [4, 5, 6, 7], "aaab"),
        ("abcdabcd", [0, 1, 2], "aab"),  # learner first in the plan
        ("aaaaaaaabbbbbbbb", [8, 9, 10, 11, 12, 13, 14, 15], "aaaaaaaa"),  # 8 GPUs a node: the learner has one whole
        ("abcdefgh", [6, 7], "ab"),  # one bundle a node: nothing to gather
        ("aaaa", [1], "a"),
    ],
)
def test_learner_ranks_sit_on_as_few_nodes_as_can_be(nodes: str, ranks: list[int], on: str) -> None:
    assert placed([ONE_GPU] * len(nodes), ranks, list(nodes)) == list(on)


def test_bundles_change_places_with_bundles_of_their_size_only() -> None:
    planned = [HALF, ONE_GPU, HALF, ONE_GPU, ONE_GPU]
    assert gathered(planned, [3, 4], list("aabab")) == [0, 4, 2, 1, 3]  # ranks on the GPUs of node a, rank 0 first
    assert gathered([HALF, HALF], [], ["a", "b"]) == [0, 1]


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=9), st.data())
def test_no_other_choice_of_bundles_takes_fewer_nodes(nodes: list[str], data: st.DataObject) -> None:
    planned = [data.draw(st.sampled_from([ONE_GPU, HALF])) for _ in nodes]
    alike = [number for number, one in enumerate(planned) if one == planned[0]]
    ranks = sorted(data.draw(st.sets(st.sampled_from(alike), min_size=1)))
    on = placed(planned, ranks, nodes)
    assert len([*groupby(on)]) == len(set(on))  # ranks of one node follow one another
    choices = combinations(alike, len(ranks))
    assert len(set(on)) == min(len({nodes[bundle] for bundle in choice}) for choice in choices)


@pytest.mark.parametrize(
    ("nodes", "cores", "threads"),
    [
        ("aaa", {"a": 16}, {"a": 5}),  # one_gpu on 16 cores
        ("a", {"a": 64}, {"a": 64}),
        ("aab", {"a": 8, "b": 96, "c": 8}, {"a": 4, "b": 96}),
        ("aaaa", {"a": 2}, {"a": 1}),
        ("ab", {"a": 0.0, "b": 7.5}, {"a": 1, "b": 7}),
    ],
)
def test_a_nodes_cores_are_shared_by_its_actors(nodes: str, cores: dict[str, float], threads: dict[str, int]) -> None:
    assert fair_threads(list(nodes), cores) == threads


@given(st.lists(st.sampled_from("abc"), min_size=1), st.tuples(*[st.integers(1, 256)] * 3))
def test_no_node_has_more_threads_than_cores_unless_it_has_more_actors(
    nodes: list[str], sizes: tuple[int, ...]
) -> None:
    cores = dict(zip("abc", map(float, sizes), strict=True))
    for node, threads in fair_threads(nodes, cores).items():
        assert threads >= 1 and threads * nodes.count(node) <= max(cores[node], nodes.count(node))


@pytest.mark.parametrize(
    ("memory", "shared", "store"),
    [
        (2 * GIB, GIB, 1.0),  # as small as they come
        (24 * GIB, 64 << 20, 1.0),  # Docker's /dev/shm: Ray takes a folder on disk, and refuses to for more than 10 GB
        (2000 * GIB, 64 << 20, 1.0),
        (2000 * GIB, 0, 1.0),  # none
        (20 * GIB, 20 * GIB, 6.0),
        (128 * GIB, 16 * GIB, 8.0),  # docker run --shm-size=16g
        (2000 * GIB, 1000 * GIB, 500.0),
        (1000 * GIB, 1000 * GIB, 300.0),
    ],
)
def test_the_object_store_grows_with_the_machine(memory: int, shared: int, store: float) -> None:
    assert object_store_bytes(memory, shared) == store * GIB


@pytest.mark.parametrize(("limit", "gib"), [("max", None), (str(3 * GIB), 3), (str(1 << 62), None), (None, None)])
def test_a_containers_limit_counts_as_the_memory(
    limit: str | None, gib: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_MEMORY_LIMITS", (tmp_path / "memory.max",))
    monkeypatch.setattr(machine.os, "sysconf", {"SC_PHYS_PAGES": 1 << 20, "SC_PAGE_SIZE": 4096}.__getitem__)
    if limit:
        (tmp_path / "memory.max").write_text(limit + "\n")
    assert machine.memory() == (gib or 4) * GIB


@pytest.mark.parametrize(
    ("job", "output", "kept"),
    [
        (None, "runs", True),
        ({}, "runs", True),
        ({"env_vars": {"A": "1"}}, "runs", True),
        ({"working_dir": "gcs://_ray_pkg_1.zip"}, "runs", False),
        ({"working_dir": "gcs://_ray_pkg_1.zip"}, "../runs", False),
        ({"working_dir": "gcs://_ray_pkg_1.zip"}, "/shared/runs", True),
    ],
)
def test_output_must_outlive_the_job(
    job: dict[str, object] | None, output: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "RAY_JOB_CONFIG_JSON_ENV_VAR"
    if job is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, json.dumps({"runtime_env": job}))
    if kept:
        check_kept(output)
    else:
        with pytest.raises(UserError, match=rf"run\.output={output} .*deletes with the job; give an absolute path"):
            check_kept(output)


def test_what_a_node_does_not_see_is_named_by_its_setting(tmp_path: Path) -> None:
    wanted = {"model.path": str(tmp_path), "model.segmenter": f"{tmp_path}/gone", "run.output": f"{tmp_path}/.token"}
    assert unseen(wanted) == [f"model.segmenter={tmp_path}/gone", f"run.output={tmp_path}/.token"]
