"""What an engine is given: defaults by placement, seats for its workers, and settings that it cannot have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.run import checks
from perception.config import Config, LoraConfig, ModelConfig, PlacementConfig, RolloutConfig
from perception.errors import UserError
from rollout.defaults import by_placement
from runtime import placement
from runtime.placement import anywhere, check_resources
from tests.builders import changed, config

ALONE = {"max_num_seqs": 256, "max_batched_tokens": 8192, "gpu_memory": 0.9, "enforce_eager": False}
SHARING = {"max_num_seqs": 64, "max_batched_tokens": 0, "gpu_memory": 0.3, "enforce_eager": True}


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [("cpu", 0.0, SHARING), ("cuda", 0.4, SHARING), ("cuda", 0.99, SHARING), ("cuda", 1.0, ALONE), ("cuda", 2, ALONE)],
)
def test_an_engine_alone_on_its_gpu_gets_more(device: Any, gpus: float, expected: dict[str, Any]) -> None:
    chosen = by_placement(RolloutConfig(), PlacementConfig(name="test", device=device, engine_gpus=gpus))
    assert chosen == replace(RolloutConfig(), **expected)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "max_num_seqs": st.integers(1, 999),
            "max_batched_tokens": st.integers(1, 99999),
            "gpu_memory": st.floats(0.01, 1.0),
            "enforce_eager": st.booleans(),
            "kv_cache_mb": st.integers(0, 9999),
        },
    ),
    st.sampled_from([("cpu", 0.0), ("cuda", 0.5), ("cuda", 1.0)]),
)
def test_what_is_set_stays_and_deciding_twice_changes_nothing(given: dict[str, Any], seat: Any) -> None:
    where = PlacementConfig(name="test", device=seat[0], engine_gpus=seat[1])
    chosen = by_placement(RolloutConfig(**given), where)
    assert {name: getattr(chosen, name) for name in given} == given
    assert by_placement(chosen, where) == chosen


def on_gpus(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(placement, "cluster_address", lambda: None)
    monkeypatch.setattr(placement, "local_gpus", lambda: gpus)
    monkeypatch.setattr(placement, "cpus", lambda: 64)


def spread(tensor_parallel: int, **changes: Any) -> Config:
    """Two engines, one reward worker and two learner ranks with a GPU each."""
    made = replace(config(), rollout=RolloutConfig(engines=2, tensor_parallel=tensor_parallel))
    each = {"device": "cuda", "transport": "nccl", "engine_gpus": 1, "reward_gpus": 1, "learner_gpus": 1}
    return changed(made, "placement", **each | changes)


@pytest.mark.parametrize(("tensor_parallel", "gpus"), [(1, 5), (2, 7), (4, 11)])
def test_an_engine_claims_gpus_for_all_its_workers(
    monkeypatch: pytest.MonkeyPatch, tensor_parallel: int, gpus: int
) -> None:
    on_gpus(monkeypatch, gpus)
    check_resources(spread(tensor_parallel))
    on_gpus(monkeypatch, gpus - 1)
    with pytest.raises(UserError, match=rf"asks for \d+ CPUs and {gpus} GPUs, this machine has .* {gpus - 1} GPUs"):
        check_resources(spread(tensor_parallel))
    (seat,) = anywhere(spread(1).placement, "engine", 1, tensor_parallel)
    assert (seat.cpus, seat.gpus) == (tensor_parallel, tensor_parallel)


@pytest.mark.parametrize(
    "changes", [{"engine_gpus": 0.5}, {"engine_gpus": 0.5, "learner_gpus": 0.5}, {"transport": "ipc"}]
)
def test_workers_of_an_engine_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    on_gpus(monkeypatch, 99)
    with pytest.raises(UserError, match=r"rollout\.tensor_parallel=2 needs a whole GPU .* set placement.engine_gpus=1"):
        check_resources(spread(2, **changes))


@pytest.mark.parametrize(
    ("room", "change", "words"),
    [
        ("model", {"dtype": "float32"}, r"with model\.dtype=float32, where vLLM wants bfloat16; change"),
        ("learner", {"lora": LoraConfig(rank=8)}, r"with learner\.lora\.rank=8, which sends parts of a layer"),
        ("learner", {"checksum": True}, r"with learner\.checksum=true: rounded weights have another sum; change"),
    ],
)
def test_fp8_is_refused_where_it_cannot_hold(room: str, change: dict[str, Any], words: str) -> None:
    fp8 = changed(changed(config(), "rollout", quantization="fp8"), "model", dtype="bfloat16")
    checks.check_settings(fp8)
    with pytest.raises(UserError, match=rf"^rollout\.quantization=fp8 {words}"):
        checks.check_settings(changed(fp8, room, **change))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("tensor_parallel", "fits"), [(1, True), (2, True), (3, True), (4, False), (6, True)])
def test_workers_divide_the_attention_heads(tmp_path: Path, nested: bool, tensor_parallel: int, fits: bool) -> None:
    text = {"num_attention_heads": 6}
    settings = {"model_type": "qwen2_5_vl"} | ({"text_config": text} if nested else text)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    asked = changed(replace(config(), model=ModelConfig(path=str(tmp_path), segmenter="")), "rollout")
    asked = changed(asked, "rollout", tensor_parallel=tensor_parallel)
    if fits:
        checks.check_family(asked)
    else:
        with pytest.raises(UserError, match=r"tensor_parallel=4 does not divide the 6 attention heads of model\.path="):
            checks.check_family(asked)
