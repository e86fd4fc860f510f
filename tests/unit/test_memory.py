"""Guards that the memory model adds up as hand-made tables do, and that its suggestions and the recipes fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from launch.run import memory
from launch.run.checks import check_memory
from launch.run.config import compose
from launch.run.memory import GIB, Layers, Machine, Room, Size, Terms
from perception.config import Config, LearnerConfig, LoraConfig, ModelConfig
from perception.errors import UserError
from tests import tiny_families, tiny_policy
from tests.builders import changed
from tests.gradients import kept_by

EXACT = ("weights", "gradients", "optimizer", "reduce bucket")
OWN = ("model.path=absent", "model.segmenter=random:large", "data.train=train.jsonl", "data.eval=eval.jsonl")
GPU_80, GPU_40, GPU_24 = 79.2, 39.4, 23.6
"""Memory of an A100 or H100, an A100 and a 4090, as CUDA reports it."""
ROOMY = Machine(gpu=GPU_80, host=128.0, disk=900.0)
PLAIN = LearnerConfig()


@cache
def settings(*overrides: str) -> Config:
    return compose([*overrides])


@cache
def size(shape: str, learner: LearnerConfig = PLAIN) -> Size:
    return memory.measure(ModelConfig(path="absent", segmenter="", shape=shape), learner)


def learner_of(shape: str, **learner: Any) -> tuple[Terms, Terms]:
    """What a rank on CUDA has on its GPU, and the run on its host."""
    config = changed(settings("recipe=quickstart", "placement=one_gpu"), "learner", **learner)
    return memory.learner(size(shape), config), memory.host(size(shape), config)


# ---------------------------------------------------------------- a learner rank, by hand


@pytest.mark.parametrize(("shape", "parameters"), [("3b", 3.755e9), ("7b", 8.292e9)])
def test_shapes_have_the_released_models_parameters(shape: str, parameters: float) -> None:
    assert size(shape).parameters == size(shape).trained == pytest.approx(parameters, rel=2e-4)


@pytest.mark.parametrize(
    ("shape", "stage", "ranks", "gib"),
    [
        *(("3b", 2, ranks, gib) for ranks, gib in ((1, 63.9), (2, 35.9), (4, 21.9), (8, 14.9))),
        *(("7b", 2, ranks, gib) for ranks, gib in ((1, 139.9), (2, 78.2), (4, 47.3), (8, 31.8))),
        ("3b", 3, 4, 16.7),
        ("7b", 3, 8, 18.3),
        ("3b", 1, 1, 63.9),  # whole float32 gradients on every rank: 2 + 4 + 12 / ranks
        ("3b", 1, 4, 32.4),
        ("7b", 1, 8, 58.9),
    ],
)
def test_weights_states_and_gradients_are_those_of_hand_made_tables(
    shape: str, stage: int, ranks: int, gib: float
) -> None:
    terms, _ = learner_of(shape, zero_stage=stage, ranks=ranks)
    assert sum(terms.get(term, 0.0) for term in EXACT) == pytest.approx(gib, abs=0.06)


@pytest.mark.parametrize(("ranks", "gpu"), [(1, 21.9), (4, 11.4)])
def test_an_offloaded_optimizer_stands_on_the_host(ranks: int, gpu: float) -> None:
    terms, host = learner_of("3b", ranks=ranks, offload_optimizer=True)
    assert sum(terms.get(term, 0.0) for term in EXACT) == pytest.approx(gpu, abs=0.06)
    assert host["optimizer"] == pytest.approx(62.9, abs=0.06), "of all ranks together"


def test_a_frozen_tower_and_adapters_have_neither_gradients_nor_states() -> None:
    frozen = size("3b", LearnerConfig(freeze_vision=True))
    assert frozen.parameters - frozen.trained == 668_684_288, "the vision tower"
    adapted = size("3b", LearnerConfig(lora=LoraConfig(rank=64)))
    # q and o: 2048 -> 2048, k and v: 2048 -> 256, gate and up: 2048 -> 11008, down: 11008 -> 2048; 36 layers
    assert adapted.trained == 36 * 64 * (2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 11008))
    assert adapted.sent == 36 * (2 * 2048**2 + 2 * 2048 * 256 + 3 * 2048 * 11008)
    assert adapted.parameters == size("3b").parameters == size("3b").sent


# ---------------------------------------------------------------- activations, against what autograd keeps


def qwen(layers: int, hidden: int, inner: int, checkpointing: bool) -> Any:
    text = {"vocab_size": 512, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "rope_parameters": ROPE}
    tower = {"depth": layers, "hidden_size": 160, "intermediate_size": 428, "num_heads": 4, "out_hidden_size": hidden}
    whole = {"fullatt_block_indexes": [*range(layers)]}
    config = Qwen2_5_VLConfig(text_config=text | ends | heads, vision_config=tower | whole)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype="bfloat16").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}


def read(model: Any) -> None:
    embeddings = torch.randn(1, 256, model.config.text_config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    model.model.language_model(inputs_embeds=embeddings, use_cache=False)


def look(model: Any) -> None:
    model.model.visual(torch.randn(256, 3 * 2 * 14 * 14, dtype=torch.bfloat16), torch.tensor([[1, 16, 16]]))


@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.parametrize(
    ("run", "layer"),
    [
        (read, lambda model: model.model.language_model.layers[0]),
        (look, lambda model: model.model.visual.blocks[0]),
    ],
    ids=["text", "vision"],
)
def test_a_layer_keeps_about_what_the_model_says(
    run: Callable[[Any], None], layer: Callable[[Any], nn.Module], checkpointing: str
) -> None:
    """At an eighth of the 3B shape: 256 tokens or patches through two and through four layers."""
    kept = []
    for layers in (2, 4):
        model = qwen(layers, 256, 1376, checkpointing == "on")
        with kept_by(model) as found:
            run(model)
        kept.append(sum(found.values()))
    one = memory._layers([layer(model)])
    said = 2 * 256 * (one.hidden if checkpointing == "on" else memory.KEPT * one.width)
    assert (kept[1] - kept[0]) / 2 == pytest.approx(said, rel=0.21)


def test_activations_grow_with_tokens_and_shrink_with_checkpointing() -> None:
    kinds = ("off", "selective", "on")
    sums = [learner_of("3b", checkpointing=kind, micro_tokens=8192)[0]["activations"] for kind in kinds]
    # 8192 tokens x 36 layers x 2 bytes x 1.5 x 51968 numbers are 42.8 GiB, half of it 21.4; inputs only are 1.1
    assert sums[0] > 42 and sums[0] - sums[1] > 21 and sums[1] - sums[2] > 21
    few = learner_of("3b", checkpointing="on", micro_tokens=4096)[0]["activations"]
    assert few == pytest.approx(sums[2] / 2)


# ---------------------------------------------------------------- engine, rooms


def engine(shape: str, memory_gib: float | None, **rollout: Any) -> Terms:
    config = changed(settings("recipe=quickstart", "placement=cluster"), "rollout", kv_cache_mb=0, **rollout)
    return memory.engine(size(shape), config, memory_gib)


def test_an_engines_share_is_weights_work_and_what_is_left_for_its_cache() -> None:
    terms = engine("7b", 80.0, gpu_memory=0.5)
    assert terms["weights"] == pytest.approx(15.45, abs=0.01)
    assert sum(terms.values()) == pytest.approx(40.0)
    assert engine("7b", 80.0, gpu_memory=0.1)["KV cache"] == 0.0, "the weights alone are more"
    # 28 layers x (153.0 M weights of linear maps in bfloat16 2, in fp8 1 byte): 4.25 GiB less; a half of them: the same
    half = engine("7b", 80.0, quantization="fp8")["weights"]
    assert half == pytest.approx(15.45 - 6.08, abs=0.05) == engine("7b", 80.0, tensor_parallel=2)["weights"]


@pytest.mark.parametrize(("shape", "kib"), [("3b", 36), ("7b", 56)])
def test_a_token_in_the_kv_cache(shape: str, kib: int) -> None:
    assert size(shape).key_value * 2 == kib * 1024


def names(config: Config, gpu: float | None = 80.0) -> list[str]:
    return [room.name for room in memory.rooms(size("3b"), config, Machine(gpu=gpu, host=100.0, disk=100.0))]


def test_actors_that_share_a_gpu_are_added_up_and_the_others_stand_alone() -> None:
    shared = settings("recipe=quickstart", "placement=one_gpu")
    assert names(shared)[0] == "GPU of learner + engine + reward"
    assert names(settings("recipe=quickstart", "placement=cluster"))[:3] == [
        "GPU of learner",
        "GPU of engine",
        "GPU of reward",
    ]
    mixed = changed(shared, "placement", transport="nccl", learner_gpus=1, engine_gpus=0.5, reward_gpus=0.25)
    mixed = changed(changed(mixed, "reward", workers=4), "rollout", engines=2)  # two GPUs of an engine and two workers
    found = memory.rooms(size("3b"), mixed, Machine(gpu=80.0, host=100.0, disk=100.0))
    assert [room.name for room in found[:2]] == ["GPU of learner", "GPU of engine + reward"]
    assert found[1].needs["reward"] == {term: 2 * value for term, value in memory.segmenter(mixed).items()}
    assert not any(name.startswith("GPU") for name in names(settings("recipe=quickstart")))


@pytest.mark.parametrize(("evaluations", "policies"), [("run.eval_every=0", 1), ("run.eval_every=5", 3)])
def test_three_checkpoints_of_12_bytes_a_parameter_and_the_exported_policies(evaluations: str, policies: int) -> None:
    config = settings("recipe=quickstart", "placement=one_gpu", evaluations)
    disk = memory.rooms(size("7b"), config, Machine(gpu=80.0, host=100.0, disk=100.0))[-1]
    assert disk.total == pytest.approx((3 * 12 + policies * 2) * 8.292e9 / GIB, rel=1e-3) and disk.short


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "llava_onevision", "internvl"])
def test_any_family_is_counted_as_it_is_loaded(family: str, tmp_path: Path) -> None:
    build = tiny_policy.build if family == "qwen2_5_vl" else lambda path: tiny_families.build(family, path)
    spec = build(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(spec.path)
    found = memory.measure(ModelConfig(path=spec.path, segmenter=""), LearnerConfig(freeze_vision=True))
    assert found.parameters == sum(parameter.numel() for parameter in loaded.parameters())
    assert 0 < found.trained < found.parameters
    assert found.text.count == loaded.config.get_text_config().num_hidden_layers and found.text.hidden == 64
    assert found.vision.count > 0


def test_what_is_not_known_from_here_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(settings("recipe=shape_3b"), "run", output=str(tmp_path / "not" / "yet"))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    machine = memory.this_machine(config)
    assert machine.gpu is None and machine.host is None and machine.disk > 0
    found = memory.rooms(size("3b"), config, machine)
    assert [room.name for room in found if room.has is not None] == ["disk of run.output"]
    assert " of      ?  GPU of learner" in memory.table(found)


# ---------------------------------------------------------------- recipes, refusals


def fits(config: Config, machine: Machine, shape: str) -> bool:
    found = memory.rooms(size(shape, config.learner), config, machine)
    return not any(room.short for room in found)


@pytest.mark.parametrize(
    ("recipe", "shape", "gpu", "host", "smaller"),
    [
        ("shape_3b", "3b", GPU_80, 128.0, GPU_40),
        ("dr_seg", "7b", GPU_80, 400.0, GPU_24),
        ("dr_seg_3b", "3b", GPU_80, 96.0, GPU_40),
        ("dr_seg_3b_lora", "3b", GPU_40, 32.0, GPU_24),
    ],
)
def test_a_recipe_is_within_the_memory_that_it_names(
    recipe: str, shape: str, gpu: float, host: float, smaller: float
) -> None:
    config = settings(f"recipe={recipe}", *(() if recipe == "shape_3b" else OWN))
    assert fits(config, Machine(gpu=gpu, host=host, disk=400.0), shape)
    assert not fits(config, Machine(gpu=smaller, host=host, disk=400.0), shape)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """An invented machine of any size."""

    def invent(gpus: int, machine: Machine) -> None:
        monkeypatch.setattr("runtime.placement.local_gpus", lambda: gpus)
        monkeypatch.setattr("runtime.placement.cpus", lambda: 64)
        monkeypatch.setattr(memory, "this_machine", lambda config: machine)

    return invent


@pytest.mark.parametrize(
    ("overrides", "gpus", "machine", "largest", "cure"),
    [
        (
            ("recipe=shape_3b", "learner.offload_optimizer=false"),
            1,
            ROOMY,
            "GPU of learner + engine + reward needs 1",
            "learner.offload_optimizer=true",
        ),
        (("recipe=shape_3b", "learner.checkpointing=off"), 1, ROOMY, "learner activations", "learner.checkpointing=on"),
        (
            (
                "recipe=shape_3b",
                "placement=cluster",
                "learner.offload_optimizer=false",
                "learner.ranks=3",
                "learner.zero_stage=1",
            ),
            5,
            Machine(gpu=GPU_40, host=128.0, disk=900.0),
            "GPU of learner needs 4",
            "learner.zero_stage=2",
        ),
        (
            ("recipe=shape_3b", "rollout.kv_cache_mb=64"),
            1,
            ROOMY,
            "KV cache for one trajectory needs 0.1 of 0.1 GiB",
            "rollout.kv_cache_mb=4096",
        ),
        (
            ("recipe=shape_3b",),
            1,
            Machine(gpu=GPU_80, host=64.0, disk=900.0),
            "host needs 73.3 of 64.0 GiB (run optimizer 62.9",
            "learner.lora.rank=64",
        ),
    ],
)
def test_what_cannot_fit_is_refused_with_a_setting_that_would(
    overrides: tuple[str, ...], gpus: int, machine: Machine, largest: str, cure: str, on: Callable[..., None]
) -> None:
    on(gpus, machine)
    printed: list[str] = []
    with pytest.raises(UserError) as refused:
        check_memory(settings(*overrides), printed.append)
    said = str(refused.value)
    assert largest in said and said.endswith(f"; {cure} would fit") and "\n" not in said
    check_memory(settings(*overrides, *cure.split()), printed.append)
    assert printed[0].startswith("memory, GiB") and max(map(len, printed[0].splitlines())) <= 100


def test_where_nothing_helps_it_says_so(on: Callable[..., None]) -> None:
    on(1, Machine(gpu=8.0, host=128.0, disk=900.0))
    with pytest.raises(UserError, match="no one or two settings would make it fit"):
        check_memory(settings("recipe=shape_3b"), lambda text: None)


def test_the_demo_says_nothing_of_memory(on: Callable[..., None]) -> None:
    on(0, Machine(gpu=None, host=8.0, disk=5.0))
    printed: list[str] = []
    check_memory(settings("recipe=quickstart"), printed.append)
    assert printed == []


def test_a_room_names_its_largest_needs() -> None:
    room = Room("GPU", {"learner": {"a": 1.0, "b": 3.0}, "engine": {"c": 2.0, "d": 0.5}}, 6.0)
    assert str(room) == "GPU needs 6.5 of 6.0 GiB (learner b 3.0, engine c 2.0, learner a 1.0)" and room.short
    assert not Room("GPU", room.needs, 6.5).short and not Room("GPU", room.needs, None).short


def test_layers_are_measured_by_their_linear_maps() -> None:
    block = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    assert memory._layers([block, block]) == Layers(count=2, hidden=4, width=24, weights=64)
