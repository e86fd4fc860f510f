"""What can be known to go wrong is said before anything heavy starts: one line each, what, where and how to mend it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from launch.record import run_directory
from launch.record.wandb_sink import logged_in
from perception.config import Config, ModelConfig
from perception.datasets import load
from perception.errors import UserError
from perception.types import Sample
from reward_workers.rewards import compares_masks, components_in_use
from runtime.cluster import check_resources

if TYPE_CHECKING:
    from launch.run.prompts import PromptMaker

_POLICY_FILES = {
    "config.json": "the model's shape",
    "tokenizer.json": "the tokenizer",
    "tokenizer_config.json": "the tokenizer's settings",
}
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # the second since transformers 5
_SEGMENTER_FILES = {"config.yaml": "the model's shape", "model.safetensors": "the weights"}


MAIN = ""
"""Name of the held-out set a run is judged by."""
REAL = 100_000_000
"""Parameters of a policy beyond which it is no toy."""


def check(config: Config) -> tuple[list[Sample], dict[str, list[Sample]]]:
    """Go through everything a run needs, cheapest first; returns its training samples and its held-out ones by set.

    Raises UserError for what is missing or contradictory, `perception.errors.DataError` for a damaged data set.
    """
    check_settings(config)
    check_output(config)
    check_model(config.model)
    check_segmenter(config.model)
    check_resources(config)
    train = load(config.data, "train")
    held_out = {MAIN: load(config.data, "eval")}
    held_out |= {name: load(config.data, "eval", path) for name, path in config.data.also.items()}
    check_data(config, train, held_out)
    check_lengths(config, [*train, *(sample for samples in held_out.values() for sample in samples)])
    return train, held_out


def check_settings(config: Config) -> None:
    """Settings that contradict one another."""
    prompts = config.algorithm.prompts_per_step
    for key, parts in (("learner.ranks", config.learner.ranks), ("algorithm.updates", config.algorithm.updates)):
        if parts > prompts:
            raise UserError(
                f"{key}={parts} is more than algorithm.prompts_per_step={prompts}: one would be empty; lower {key}"
            )
    if config.learner.compile and (config.placement.device != "cuda" or config.learner.zero_stage == 3):
        raise UserError(
            f"learner.compile=true with placement.device={config.placement.device}, learner.zero_stage="
            f"{config.learner.zero_stage}: only whole layers on CUDA are compiled; take zero_stage 1 or 2 there, or "
            "learner.compile=false"
        )
    if config.rollout.max_new_tokens >= config.rollout.max_model_len:
        raise UserError(
            f"rollout.max_new_tokens={config.rollout.max_new_tokens} leaves no room for the prompt in "
            f"rollout.max_model_len={config.rollout.max_model_len}; raise max_model_len"
        )
    if config.algorithm.loss not in ("ppo", "gspo", "cispo"):
        raise UserError(f"algorithm.loss={config.algorithm.loss}: no such surrogate; there are ppo, gspo, cispo")
    if not config.reward.components and not config.reward.ranked:
        raise UserError(f"reward={config.reward.name} has neither components nor ranked: nothing would be rewarded")
    try:
        components_in_use(config.reward)
    except ValueError as error:
        raise UserError(str(error)) from error
    if config.wandb.mode == "online" and not logged_in():
        raise UserError("wandb.mode=online, but nobody is logged in: run `wandb login`, or use wandb.mode=auto")


def check_output(config: Config) -> None:
    """The run's directory can be made, or the run to resume is there. Makes nothing yet."""
    if config.run.resume is not None:
        run_directory.resume_dir(config.run)
    path = Path(config.run.output).absolute()
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise UserError(f"run.output={config.run.output}: {path} is a file; choose another directory")
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"run.output={config.run.output}: cannot write to {path}; choose another directory")


def check_model(model: ModelConfig) -> None:
    """The policy's directory is whole: configuration, tokenizer, image processor, readable weights."""
    path = Path(model.path)
    _check_files("model.path", path, _POLICY_FILES)
    settings = {name: _read_json(path / name) for name in _POLICY_FILES}
    processor = next((path / name for name in _PROCESSOR_FILES if (path / name).is_file()), None)
    if processor is None:
        raise UserError(
            f"model.path={path}: {_PROCESSOR_FILES[0]} is missing (the image processor); "
            "copy it from the model you started from"
        )
    _read_json(processor)
    if "image_token_id" not in settings["config.json"]:
        raise UserError(
            f"{path}/config.json has no image_token_id: not a vision-language model; choose another model.path"
        )
    weights = _weight_files(path)
    if not weights:
        raise UserError(
            f"model.path={path}: no *.safetensors there (the weights); export the model with save_pretrained"
        )
    for file in weights:
        _parameters(file)


def toy_settings(config: Config) -> list[str]:
    """One warning for each setting that suits a toy, where the policy has more than `REAL` parameters."""
    size = sum(map(_parameters, _weight_files(Path(config.model.path))))
    learner, rollout = config.learner, config.rollout
    toys = {
        f"learner.lr={learner.lr:g}, where published runs take 1e-6": learner.lr >= 1e-5 and not learner.lora.rank,
        f"rollout.max_new_tokens={rollout.max_new_tokens}, which cuts answers short": rollout.max_new_tokens < 256,
        f"rollout.max_model_len={rollout.max_model_len}, which one image may fill": rollout.max_model_len < 1024,
        "model.dtype=float32, where bfloat16 takes half the memory": config.model.dtype == "float32",
    }
    found = [what for what, is_toy in toys.items() if is_toy and size > REAL]
    return [f"{what}: that suits a toy, not {size / 1e6:.0f} M parameters" for what in found]


def check_segmenter(model: ModelConfig) -> None:
    """The SAM2 directory is whole; `random:<name>` needs none."""
    if model.segmenter.startswith("random:"):
        return
    path = Path(model.segmenter)
    _check_files("model.segmenter", path, _SEGMENTER_FILES)
    _parameters(path / "model.safetensors")


def check_data(config: Config, train: Sequence[Sample], held_out: Mapping[str, Sequence[Sample]]) -> None:
    """Enough samples for a step, a prompt template for each of their tasks, and masks where masks are learned from."""
    prompts = config.algorithm.prompts_per_step
    if prompts > len(train):
        raise UserError(
            f"algorithm.prompts_per_step={prompts}, but {config.data.train} holds {len(train)} samples: "
            "lower prompts_per_step or give more data"
        )
    if compares_masks(config.reward) or config.look.mode == "relook":
        _check_masks(config, train)
    paths = {MAIN: config.data.eval, **config.data.also}
    for path, samples in ((config.data.train, train), *((paths[name], held_out[name]) for name in paths)):
        for sample in samples:
            if sample.task not in config.task:
                raise UserError(
                    f"{path}: sample {sample.id} has the task {sample.task!r}, but templates exist for "
                    f"{', '.join(config.task) or 'none'}; add task.{sample.task} or change the data"
                )


def _check_masks(config: Config, train: Sequence[Sample]) -> None:
    for sample in train:
        if sample.target.count and not sample.target.masks:
            why = f"look={config.look.mode}" if config.look.mode == "relook" else f"reward={config.reward.name}"
            raise UserError(
                f"{config.data.train}: sample {sample.id} has no masks, and {why} compares masks with the truth: "
                "add masks, or choose a look and a reward without them"
            )


def check_lengths(config: Config, samples: Sequence[Sample]) -> None:
    """The longest prompt leaves room for an answer: text, image tokens and max_new_tokens fit max_model_len."""
    from launch.run.prompts import PromptMaker  # imports transformers: seconds

    try:
        prompts = PromptMaker(config.model, config.task)
        of_task = {task: [s for s in samples if s.task == task] for task in {s.task for s in samples}}
        longest = [max(own, key=lambda s: len(s.question)) for own in of_task.values()]
        inline = config.look.mode == "inline"
        text = {sample.id: len(prompts.tokens(sample.question, sample.task, inline)) for sample in longest}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.path={config.model.path}: the tokenizer cannot build a prompt: {error}") from error
    image = max(prompts.image_tokens(*size) for size in {(s.height, s.width) for s in samples})
    worst = max(text, key=text.__getitem__)
    further = _further_passes(config, prompts, {sample.task for sample in samples})
    needed = text[worst] + image - 1 + config.rollout.max_new_tokens + further
    if needed > config.rollout.max_model_len:
        raise UserError(
            f"rollout.max_model_len={config.rollout.max_model_len} is too short; raise it to {needed} = "
            f"{text[worst] - 1} text tokens ({worst}) + {image} image tokens + "
            f"rollout.max_new_tokens={config.rollout.max_new_tokens}"
            + (f" + {further} of further looks" if further else "")
        )
    passes = config.look.max_passes if config.look.mode == "relook" else 1
    if config.rollout.max_images < passes:
        raise UserError(
            f"rollout.max_images={config.rollout.max_images} must be {passes}: one image a pass (look.max_passes)"
        )


def _further_passes(config: Config, prompts: PromptMaker, tasks: set[str]) -> int:
    """Tokens that the looks after the first may need: the request, the view and another answer, each time."""
    if config.look.mode != "relook":
        return 0
    side = math.isqrt(config.look.pixels)
    request = max(len(prompts.again(task)) for task in tasks) - 1 + prompts.image_tokens(side, side)
    return (config.look.max_passes - 1) * (request + config.rollout.max_new_tokens)


def _check_files(key: str, path: Path, needed: dict[str, str]) -> None:
    if not path.is_dir():
        raise UserError(
            f"{key}={path}: no such directory; give the directory of a model, or build one (python -m launch.sft)"
        )
    for name, role in needed.items():
        if not (path / name).is_file():
            raise UserError(f"{key}={path}: {name} is missing ({role}); copy it from the model you started from")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; copy it again") from error
    return content


def _weight_files(path: Path) -> list[Path]:
    """All *.safetensors of a policy, or the shards that its index names."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return [path / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
    return sorted(path.glob("*.safetensors"))


def _parameters(path: Path) -> int:
    """How many numbers the file holds. Reads the header only, which also tells a file cut short. Raises UserError."""
    try:
        with safe_open(path, framework="np") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}; copy it again") from error
