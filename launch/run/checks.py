"""Preflight checks: what can be known to go wrong is one line before anything heavy starts."""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from launch.record import run_directory
from launch.record.trackers import check_trackers
from launch.record.trackers.wandb import logged_in
from launch.run.alarms import Rule
from launch.run.models import reading
from launch.run.nodes import check_kept
from launch.run.samples import Samples, load_samples
from perception.config import Config, ModelConfig, weights
from perception.errors import UserError
from perception.families import FAMILIES, engine_renames, family_of
from perception.registry import find_plugins
from perception.tasks import TASKS
from reward_workers.components import held_out_terms, reward_terms
from runtime.placement import check_resources

_POLICY_FILES = {
    "config.json": "the model's shape",
    "tokenizer.json": "the tokenizer",
    "tokenizer_config.json": "the tokenizer's settings",
}
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # the second since transformers 5

REAL = 100_000_000
"""Parameters of a policy beyond which it is no toy."""


def check_machine(config: Config, say: Callable[[str], None]) -> None:
    """What is known before anything is prepared: the settings, and whether this machine can hold the run.

    Says where a GPU's memory goes. Raises UserError for what is missing, contradictory or too large.
    """
    find_plugins(config.plugins)
    check_settings(config)
    check_output(config)
    check_kept(config.run.output)
    check_resources(config)
    if config.model.shape is None or Path(config.model.path).exists():
        with reading(config.model.path):
            check_model(config.model)
    check_memory(config, say)


def check_files(config: Config, phase: Callable[[str], None] = lambda name: None) -> Samples:
    """Models and data, cheapest first; returns the run's training samples and its held-out ones. `phase` is told what
    is being checked.

    Raises UserError for what is missing or does not fit, `perception.errors.DataError` for a damaged data set.
    """
    phase("checking policy and segmenter")
    with reading(config.model.path):
        check_model(config.model)
        check_family(config)
    check_segmenter(config.model)
    phase("reading and checking the data")
    return load_samples(config)


def check_memory(config: Config, say: Callable[[str], None]) -> None:
    """Every GPU, the host and the disk hold what the memory model puts there."""
    from launch.run import memory  # imports transformers: seconds
    from launch.run.cure import cure

    machine = memory.this_machine(config)
    with reading(config.model.path):
        size = memory.measure(config.model, config.learner)
    places = memory.rooms(size, config, machine)
    short = [room for room in places if room.short]
    if short or config.placement.device == "cuda":
        say(memory.table(places))
    if short:
        raise UserError(f"placement={config.placement.name}: {short[0]}; {cure(config, machine, _possible)}")


def _possible(config: Config) -> bool:
    try:
        check_settings(config)
        check_resources(config)
    except UserError:
        return False
    return True


def check_settings(config: Config) -> None:
    """Settings that contradict one another."""
    algorithm, learner, placement, rollout = config.algorithm, config.learner, config.placement, config.rollout
    for key, parts in (("learner.ranks", learner.ranks), ("algorithm.updates", algorithm.updates)):
        if parts > algorithm.prompts_per_step:
            more = f"{key}={parts} is more than {algorithm.prompts_per_step=}"
            raise UserError(f"{more}: one would be empty; lower {key}")
    if learner.compile and (placement.device != "cuda" or learner.zero_stage == 3):
        where = f"learner.compile=true with {placement.device=!s}, {learner.zero_stage=}"
        cure = "take zero_stage 1 or 2 there, or learner.compile=false"
        raise UserError(f"{where}: only whole layers on CUDA are compiled; {cure}")
    if rollout.max_new_tokens >= rollout.max_model_len:
        lengths = f"{rollout.max_new_tokens=} leaves no room for the prompt in {rollout.max_model_len=}"
        raise UserError(f"{lengths}; raise max_model_len")
    if (shape := config.model.shape) is not None:
        from synthetic.policies import SHAPES  # imports transformers: seconds

        if shape not in SHAPES:
            raise UserError(f"model.shape={shape}: unknown; there are {', '.join(SHAPES)}")
    if rollout.quantization:
        check_quantization(config)
    check_registered(config)
    if not weights(config.reward.components) and not weights(config.reward.ranked):
        raise UserError(f"reward={config.reward.name} has neither components nor ranked: nothing would be rewarded")
    check_trackers(config.run.trackers)
    list(map(Rule, config.run.stop_if))
    profiled(config)
    if config.wandb.mode == "online" and not logged_in():
        raise UserError("wandb.mode=online, but nobody is logged in: run `wandb login`, or use wandb.mode=auto")


def profiled(config: Config) -> range:
    """The steps of `run.profile_steps`, if any. Raises UserError."""
    given = config.run.profile_steps
    found = re.fullmatch(r"([1-9]\d*):(\d+)", given or "")
    steps = range(int(found[1]), int(found[2]) + 1) if found else range(0)
    if given is not None and not (0 < len(steps) <= 10 and steps[-1] <= config.algorithm.steps):
        cure = f'give the first and the last step, as "3:5", at most 10 of {config.algorithm.steps=}'
        raise UserError(f"run.profile_steps={given}: {cure}")
    return steps


def check_quantization(config: Config) -> None:
    """Nothing is asked of an engine in fp8 that it cannot do."""
    dtype, rank = config.model.dtype, config.learner.lora.rank
    refused = {
        f"model.dtype={dtype}, where vLLM wants bfloat16": dtype != "bfloat16",
        f"learner.lora.rank={rank}, which sends parts of a layer where vLLM wants all of it": rank > 0,
        "learner.checksum=true: rounded weights have another sum": config.learner.checksum,
    }
    if found := [what for what, is_so in refused.items() if is_so]:
        raise UserError(f"rollout.quantization={config.rollout.quantization} with {found[0]}; change one of the two")


def check_registered(config: Config) -> None:
    """Every name in the settings is registered, and its arguments fit."""
    from learner.loss import SURROGATES  # imports torch

    reward_terms(config.reward)
    SURROGATES[config.algorithm.loss]
    for name, task in config.task.items():
        held_out_terms(TASKS[task.form or name].metrics)


def check_output(config: Config) -> None:
    """The run's directory can be made, and the run to go on from is there. Makes nothing yet."""
    run, path = config.run, Path(config.run.output).absolute()
    if run.resume is not None or run.resume_weights is not None:
        run_directory.find(run)
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise UserError(f"run.output={config.run.output}: {path} is a file; choose another directory")
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"run.output={config.run.output}: cannot write to {path}; choose another directory")


def check_model(model: ModelConfig) -> None:
    """The policy is an image-text model, and whole: configuration, tokenizer, image processor, readable weights."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING  # seconds

    path = Path(model.path)
    _check_files("model.path", path, _POLICY_FILES)
    settings = {name: _read_json(path / name) for name in _POLICY_FILES}
    kind, names = settings["config.json"].get("model_type"), ", ".join(FAMILIES)
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UserError(f"model.path={path}: {kind} is not supported: only image-text models are, such as {names}")
    if {"quantization_config", "compression_config"} & settings["config.json"].keys():
        quantised = "its weights are quantised, which cannot be trained; take the unquantised ones"
        raise UserError(f"model.path={path}: {quantised}")
    processor = next((path / name for name in _PROCESSOR_FILES if (path / name).is_file()), None)
    if processor is None:
        missing = f"{kind} has no {_PROCESSOR_FILES[0]}, and only models with an image processor are supported"
        raise UserError(f"model.path={path}: {missing}; copy it from the model you started from")
    _read_json(processor)
    weights = _weight_files(path)
    if not weights:
        raise UserError(f"model.path={path}: no *.safetensors there (the weights); write them by save_pretrained")
    for file in weights:
        _parameters(file)


def toy_settings(config: Config) -> list[str]:
    """One warning for each setting that suits a toy, where the policy has more than `REAL` parameters."""
    size = sum(map(_parameters, _weight_files(Path(config.model.path))))
    learner, rollout = config.learner, config.rollout
    toys = {
        f"{learner.lr=:g}, where published runs take 1e-6": learner.lr >= 1e-5 and not learner.lora.rank,
        f"{rollout.max_new_tokens=}, which cuts answers short": rollout.max_new_tokens < 256,
        f"{rollout.max_model_len=}, which one image may fill": rollout.max_model_len < 1024,
        "model.dtype=float32, where bfloat16 takes half the memory": config.model.dtype == "float32",
    }
    found = [what for what, is_toy in toys.items() if is_toy and size > REAL]
    return [f"{what}: that suits a toy, not {size / 1e6:.0f} M parameters" for what in found]


def check_family(config: Config) -> None:
    """The policy's family can do what the settings ask for."""
    settings, device = _read_json(Path(config.model.path) / "config.json"), config.placement.device
    kind, tower = settings["model_type"], settings.get("vision_config", {}).get("model_type")
    family = family_of(kind)
    for place in {device, f"{device} {config.model.dtype}"} & family.unfit.keys():
        fit = ", ".join(name for name in FAMILIES if place not in FAMILIES[name].unfit)
        why = f"{kind} cannot be trained with placement.device={device}: {family.unfit[place]}"
        raise UserError(f"model.path={config.model.path}: {why}; supported there are {fit}")
    if config.look.mode == "relook" and not family.images_alone:
        raise UserError(f"look=relook: {kind} sees one image otherwise than two; take look=none or look=inline")
    if config.learner.checksum and engine_renames(kind, tower):
        raise UserError(f"learner.checksum=true: the engine leaves weights out that {kind} does not use; take false")
    heads = settings.get("text_config", settings).get("num_attention_heads", 0)
    if heads % config.rollout.tensor_parallel:
        workers = f"rollout.tensor_parallel={config.rollout.tensor_parallel}"
        raise UserError(f"{workers} does not divide the {heads} attention heads of model.path={config.model.path}")
    if (config.model.min_pixels or config.model.max_pixels) and not family.native:
        raise UserError(f"model.min_pixels, model.max_pixels: {kind} has no such limits; leave both null")
    if config.model.answer_frame == "resized" and family.frame != "resized":
        raise UserError(f"model.answer_frame=resized: {kind} answers in 0..1000; take model.answer_frame=thousand")


def check_segmenter(model: ModelConfig) -> None:
    """The SAM2 directory is whole: a yaml, and weights that can be read; `random:<name>` needs none."""
    if model.segmenter.startswith("random:"):
        return
    from reward_workers.segmenter import model_files, read_weights  # imports torch: seconds

    _check_files("model.segmenter", Path(model.segmenter), {})
    try:
        weights = model_files(Path(model.segmenter))[1]
        _ = _parameters(weights) if weights.suffix == ".safetensors" else read_weights(weights, "meta")
    except (OSError, ValueError) as error:
        raise UserError(f"model.segmenter={model.segmenter}: {error}; copy it again") from error


def _check_files(key: str, path: Path, needed: dict[str, str]) -> None:
    if not path.is_dir():
        cure = "give the directory of a model or its hub id, or build one (python -m launch.sft)"
        raise UserError(f"{key}={path}: no such directory; {cure}")
    for name, role in needed.items():
        if not (path / name).is_file():
            raise UserError(f"{key}={path}: {name} is missing ({role}); copy it from the model you started from")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}; copy it again") from error


def _weight_files(path: Path) -> list[Path]:
    """All *.safetensors of a policy, or the shards that its index names."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return [path / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
    return sorted(path.glob("*.safetensors"))


def _parameters(path: Path) -> int:
    """Count of the file's numbers. Reads the header only, which also tells a file cut short. Raises UserError."""
    try:
        with safe_open(path, framework="np") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}; copy it again") from error
