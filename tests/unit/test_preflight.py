"""Guards that what can be known to go wrong is said in one line, with place and remedy, before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import save_file

from launch import evaluate, train
from launch.run import checks as preflight
from launch.run import memory
from launch.run.config import compose
from perception.config import Config, DataConfig, LoraConfig, ModelConfig
from perception.errors import DataError, UserError
from tests.builders import changed, config


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    """Directories that hold what a policy and a segmenter must hold, and nothing else."""
    policy, segmenter = tmp_path / "policy", tmp_path / "segmenter"
    policy.mkdir()
    segmenter.mkdir()
    processor = {"patch_size": 14, "merge_size": 2, "size": {"shortest_edge": 3136, "longest_edge": 50176}}
    for name, content in (
        ("config.json", {"model_type": "qwen2_5_vl"}),
        ("tokenizer.json", {}),
        ("tokenizer_config.json", {}),
        ("preprocessor_config.json", processor),
    ):
        (policy / name).write_text(json.dumps(content))
    save_file({"w": np.zeros(3, np.float32)}, policy / "model.safetensors")
    (segmenter / "config.yaml").write_text("model: {}")
    save_file({"w": np.zeros(3, np.float32)}, segmenter / "model.safetensors")
    return ModelConfig(path=str(policy), segmenter=str(segmenter))


def test_whole_models_pass(model: ModelConfig) -> None:
    preflight.check_model(model)
    preflight.check_segmenter(model)
    preflight.check_segmenter(replace(model, segmenter="random:tiny"))


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "model.safetensors"],
)
def test_a_missing_policy_file_is_named(model: ModelConfig, name: str) -> None:
    (Path(model.path) / name).unlink()
    with pytest.raises(UserError, match=name.replace("model.", r"\*?\.?")):
        preflight.check_model(model)


def test_weights_cut_short_are_found(model: ModelConfig) -> None:
    weights = Path(model.path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        preflight.check_model(model)


def test_a_shard_that_the_index_names_must_be_there(model: ModelConfig) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (Path(model.path) / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="00002-of-00002"):
        preflight.check_model(model)


def test_other_damage_to_a_model(model: ModelConfig) -> None:
    with pytest.raises(UserError, match="no such directory"):
        preflight.check_model(replace(model, path="absent"))
    (Path(model.path) / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        preflight.check_model(model)


def of_kind(model: ModelConfig, model_type: str, **settings: object) -> None:
    (Path(model.path) / "config.json").write_text(json.dumps({"model_type": model_type, **settings}))


@pytest.mark.parametrize("kind", ["llama", "clip", "no_such_model"])
def test_only_image_text_models_are_taken(model: ModelConfig, kind: str) -> None:
    of_kind(model, kind)
    with pytest.raises(
        UserError, match=rf"{kind} is not supported: only image-text models.*qwen2_vl.*internvl"
    ) as said:
        preflight.check_model(model)
    assert "\n" not in str(said.value)


def test_a_model_without_an_image_processor_is_refused_by_name(model: ModelConfig) -> None:
    of_kind(model, "llava")
    preflight.check_model(model)
    (Path(model.path) / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"llava has no preprocessor_config\.json, and only models with an image proc"):
        preflight.check_model(model)


@pytest.mark.parametrize(
    ("kind", "room", "change", "words"),
    [
        (
            "gemma3",
            "model",
            {},
            r"gemma3 cannot be trained with placement\.device=cpu: .*causal.*supported there are.*llava",
        ),
        ("qwen3_5", "model", {}, r"qwen3_5 cannot be trained with placement\.device=cpu.*take model\.dtype=bfloat16"),
        ("llava_onevision", "look", {"mode": "relook"}, r"look=relook: llava_onevision"),
        ("llava_onevision", "model", {"answer_frame": "resized"}, r"answer_frame=resized: llava_onevision answers in"),
        ("llava_onevision", "learner", {"checksum": True}, r"learner\.checksum=true: .* llava_onevision"),
    ],
)
def test_what_a_family_cannot_do_is_refused_by_name(
    model: ModelConfig, tmp_path: Path, kind: str, room: str, change: dict[str, object], words: str
) -> None:
    of_kind(model, kind, vision_config={"model_type": "siglip_vision_model"})
    settings = replace(config(tmp_path), model=model)
    if change:
        preflight.check_family(settings)
    with pytest.raises(UserError, match=words) as said:
        preflight.check_family(changed(settings, room, **change))
    assert "\n" not in str(said.value)
    of_kind(model, "qwen2_5_vl", vision_config={})
    preflight.check_family(changed(settings, room, **change))


def test_qwen3_5_is_taken_in_bfloat16(model: ModelConfig, tmp_path: Path) -> None:
    of_kind(model, "qwen3_5")
    preflight.check_family(changed(replace(config(tmp_path), model=model), "model", dtype="bfloat16"))


def test_gemma3_is_taken_on_cuda(model: ModelConfig, tmp_path: Path) -> None:
    of_kind(model, "gemma3")
    preflight.check_family(changed(replace(config(tmp_path), model=model), "placement", device="cuda"))


def test_a_damaged_segmenter(model: ModelConfig) -> None:
    (Path(model.segmenter) / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"needs \*\.yaml"):
        preflight.check_segmenter(model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: changed(c, "learner", ranks=33), "learner.ranks=33"),
        (lambda c: changed(c, "algorithm", updates=33), "algorithm.updates=33"),
        (lambda c: changed(c, "learner", compile=True), "learner.compile=true with placement.device=cpu"),
        (lambda c: changed(c, "rollout", max_new_tokens=512), "max_new_tokens=512"),
        (lambda c: changed(c, "reward", components={}, ranked={}), "neither components nor ranked"),
        (
            lambda c: changed(c, "reward", components={"mask_io": 1.0}),
            "reward.components: no component 'mask_io'; did you mean 'mask_iou'",
        ),
        (
            lambda c: changed(c, "reward", ranked={"s_measure": {"weight": 1.0, "alhpa": 0.3}}),
            "reward.ranked.s_measure: unknown key 'alhpa'; did you mean 'alpha'",
        ),
        (
            lambda c: changed(c, "reward", ranked={"mask_iou": 1.0}),
            "reward.components and reward.ranked both name mask_iou",
        ),
        (lambda c: changed(c, "algorithm", loss="gsop"), "no surrogate 'gsop'; did you mean 'gspo'"),
        (
            lambda c: replace(c, task={"segmnt": c.task["segment"]}),
            "no task 'segmnt'; did you mean 'segment'",
        ),
        (
            lambda c: replace(c, task={"any": replace(c.task["segment"], form="segmnt")}),
            "no task 'segmnt'; did you mean 'segment'",
        ),
        (lambda c: changed(c, "wandb", mode="online"), "wandb login"),
    ],
)
def test_settings_that_contradict(
    change: Callable[[Config], Config],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    good = changed(config(tmp_path), "reward", components={"mask_iou": 1.0}, ranked={})
    preflight.check_settings(good)
    with pytest.raises(UserError, match=words) as raised:
        preflight.check_settings(change(good))
    assert "\n" not in str(raised.value)


TOY = {"learner": {"lr": 1e-4}, "rollout": {"max_new_tokens": 96, "max_model_len": 512}, "model": {"dtype": "float32"}}
REAL = {
    "learner": {"lr": 1e-6},
    "rollout": {"max_new_tokens": 3000, "max_model_len": 4300},
    "model": {"dtype": "bfloat16"},
}


def with_shards(policy: Path, *parameters: int) -> None:
    """Weights of so many one-byte numbers, in shards that an index names: headers, and holes for the rest."""
    for number, size in enumerate(parameters):
        header = {"w": {"dtype": "U8", "shape": [size // 1000, 1000], "data_offsets": [0, size]}}
        text = json.dumps(header).encode()
        with (policy / f"model-{number}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + size)
    index = {"weight_map": {f"w{number}": f"model-{number}.safetensors" for number in range(len(parameters))}}
    (policy / "model.safetensors.index.json").write_text(json.dumps(index))


def warned(settings: Config, values: dict[str, dict[str, object]]) -> list[str]:
    """The keys that are warned about."""
    for room, own in values.items():
        settings = changed(settings, room, **own)
    return [line.partition("=")[0] for line in preflight.toy_settings(settings)]


def test_a_toys_settings_are_warned_about_where_the_policy_is_none(model: ModelConfig, tmp_path: Path) -> None:
    settings = replace(config(tmp_path), model=model)
    assert warned(settings, TOY) == [], "a toy may have them"
    with_shards(Path(model.path), 60_000_000, 60_000_000)
    assert warned(settings, TOY) == ["learner.lr", "rollout.max_new_tokens", "rollout.max_model_len", "model.dtype"]
    assert warned(settings, REAL) == []
    assert warned(settings, REAL | {"learner": {"lr": 1e-5}}) == ["learner.lr"]
    assert warned(settings, REAL | {"learner": {"lr": 1e-4, "lora": LoraConfig(rank=8)}}) == [], "usual for adapters"
    line = preflight.toy_settings(
        changed(replace(settings, model=replace(model, dtype="bfloat16")), "learner", lr=3e-5)
    )[0]
    assert line.startswith("learner.lr=3e-05, where published runs take 1e-6") and "120 M parameters" in line


def test_a_policy_of_100_million_parameters_is_still_a_toy(model: ModelConfig, tmp_path: Path) -> None:
    settings = replace(config(tmp_path), model=model)
    with_shards(Path(model.path), 60_000_000, 40_000_000)
    assert warned(settings, TOY) == []
    with_shards(Path(model.path), 60_000_000, 40_001_000)
    assert len(warned(settings, TOY)) == 4


def test_output_must_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preflight.check_output(config(tmp_path / "new" / "place"))
    assert not (tmp_path / "new").exists(), "checking makes nothing"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        preflight.check_output(config(tmp_path / "file" / "runs"))
    with pytest.raises(UserError, match="no run there"):
        preflight.check_output(changed(config(tmp_path), "run", resume="absent"))
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UserError, match="cannot write"):
        preflight.check_output(config(tmp_path))


def test_check_stops_at_missing_data_and_tells_what_it_checks(model: ModelConfig, tmp_path: Path) -> None:
    settings, told = replace(config(tmp_path), model=model), list[str]()
    absent = DataConfig(format="jsonl", train=str(tmp_path / "absent.jsonl"), eval=str(tmp_path / "absent.jsonl"))
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        preflight.check_files(replace(settings, data=absent), told.append)
    assert told == ["checking policy and segmenter", "reading and checking the data"]


@pytest.mark.parametrize(
    ("overrides", "gpus", "words"),
    [
        (["recipe=shape_3b"], 0, "placement=one_gpu needs a CUDA GPU and this machine shows none"),
        (["recipe=shape_3b"], 1, "GPU of learner .* needs .* would fit|no one or two settings"),
        (["recipe=quickstart", "learner.ranks=33"], 0, r"learner\.ranks=33"),
        (["recipe=quickstart", "model.shape=4b"], 0, r"model\.shape=4b: unknown; there are 3b, 7b, mini"),
        (["recipe=quickstart", "model.path=absent"], 0, "no such directory"),
        (["recipe=quickstart", "placement.engine_cpus=900"], 0, "placement=cpu asks for"),
    ],
)
@pytest.mark.parametrize("program", [train, evaluate])
def test_what_this_machine_cannot_hold_is_refused_before_anything_is_prepared(
    program: ModuleType, overrides: list[str], gpus: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*_: object, **__: object) -> None:
        raise AssertionError("prepared")

    monkeypatch.setattr(program, "prepare", prepare)
    monkeypatch.setattr("runtime.placement.local_gpus", lambda: gpus)
    monkeypatch.setattr("runtime.placement.cpus", lambda: 8)
    monkeypatch.setattr(memory, "this_machine", lambda _: memory.Machine(gpu=24.0, host=64.0, disk=100.0))
    world = ["data.train=absent/train.json", "data.eval=absent/eval.json", f"run.output={tmp_path}"]
    with pytest.raises(UserError, match=words) as refused:
        program.run(compose([*overrides, *world]))
    assert "\n" not in str(refused.value)
    if words.startswith("placement=cpu"):  # and what it can hold is not
        with pytest.raises(AssertionError, match="prepared"):
            program.run(compose(["recipe=quickstart", *world]))
