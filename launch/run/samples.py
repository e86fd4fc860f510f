"""Samples of a run: the data sets of its settings, checked at the start as far as that costs little, then as drawn.

At the start: the first `CHECKED` records and the longest questions of every set, and held-out samples whole, pixels
included. Every other record is checked when it is drawn, in the same way.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from launch.run.agreement import check_agreement
from launch.run.models import reading
from launch.run.prompts import PromptMaker
from perception.config import Config, DataConfig, TaskConfig
from perception.datasets import Dataset, load
from perception.errors import DataError, UserError
from perception.grammar import clean
from perception.images import pixels
from perception.tasks import TASKS
from perception.types import Sample, Truth
from reward_workers.components import held_out_terms, needed_truth, needs
from runtime.objects import fetch, handle

MAIN = ""
"""Name of the held-out set a run is judged by."""
Samples = tuple[Sequence[Sample], dict[str, list[Sample]]]
"""Those to train on, and the held-out ones by the name of their set."""
CHECKED = 256
_NO_PROMPT = "no prompt can be built"
_DECODED = 32  # training images whose pixels are read, too: a broken copy usually breaks many


def load_samples(config: Config) -> Samples:
    """Training samples (none without `data.train`), each checked again when it is drawn, and the first
    `data.eval_samples` of every held-out set. Prints what is left out.

    Raises DataError for a record that cannot be used, and UserError where no record would do.
    """
    data = config.data
    train = load(data, data.train) if data.train else None
    held_out = {name: load(data, path, held_out=True) for name, path in {MAIN: data.eval, **data.also}.items()}
    if train is not None and config.algorithm.prompts_per_step > len(train):
        few = f"{config.algorithm.prompts_per_step=}, but {data.train} holds {len(train)} samples"
        raise UserError(f"{few}: lower prompts_per_step or give more data")
    prompts = make_prompts(config)
    for one in held_out.values():
        one.check = Check(config, prompts, _evaluated(config))
    if train is not None:
        train.check = Check(config, prompts, _rewarded(config))
        start = [*islice(train.usable(), CHECKED), *_longest(train, prompts)]
        _decode(start[:_DECODED])
    chosen = {name: list(islice(one.usable(), data.eval_samples)) for name, one in held_out.items()}
    for name, samples in chosen.items():
        if not samples:
            raise DataError(f"{held_out[name].path}: no record can be used")
        _decode(samples)
    for one in (*([] if train is None else [train]), *held_out.values()):
        if skipped := left_out(one):
            counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
            print(f"{one.path}: left out so far: {counts}; the first: {next(iter(one.bad.values()))}")
    return [] if train is None else train, chosen


def left_out(samples: Sequence[Sample]) -> dict[str, int]:
    """Records of a data set that could not be used and were skipped so far, by reason."""
    return samples.skipped if isinstance(samples, Dataset) else {}


def fingerprint(data: DataConfig, samples: Sequence[Sample]) -> dict[str, Any]:
    """What tells a run's training samples from others: where they are read, how many, and a hash over the questions."""
    records = samples.records if isinstance(samples, Dataset) else samples
    asked = json.dumps([(one.id, one.task, one.question) for one in records])
    ids = hashlib.sha256(asked.encode()).hexdigest()[:16]
    return {"data.format": data.format, "data.train": data.train, "records": len(records), "ids": ids}


def make_prompts(config: Config) -> PromptMaker:
    """Raises UserError where the policy's files make no prompt or contradict something, or an engine is not given room
    for its images."""
    passes = config.look.max_passes if config.look.mode == "relook" else 1
    if config.rollout.max_images < passes:
        raise UserError(f"{config.rollout.max_images=} must be {passes}: one image a pass (look.max_passes)")
    with reading(config.model.path, _NO_PROMPT):
        prompts = PromptMaker(config.model, config.task)
        check_agreement(config, prompts)
    return prompts


@dataclass(frozen=True, slots=True)
class Check:
    """What a run asks of a sample: prompt words for its task, the truth it is measured by, room for its answer."""

    config: Config
    prompts: PromptMaker
    tasks: Mapping[str, tuple[frozenset[Truth], str]]
    """By task: the truth that is needed, and why."""

    def __call__(self, sample: Sample) -> None:
        """Raises DataError; UserError where the chat template is to blame."""
        if sample.task not in self.tasks:
            known = f"templates exist for {', '.join(self.tasks) or 'none'}; add task.{sample.task} or change the data"
            raise DataError(f"the task is {sample.task!r}, but {known}", "task")
        needed, why = self.tasks[sample.task]
        if missing := " and ".join(sorted(needed - sample.target.known)):
            cure = "add them, or choose a task, a reward and a look without them"
            raise DataError(f"no {missing}, and {why}: {cure}", "truth")
        self._fits(sample)

    def _fits(self, sample: Sample) -> None:
        """Text, image tokens and max_new_tokens fit max_model_len."""
        rollout, prompts = self.config.rollout, self.prompts
        with reading(self.config.model.path, _NO_PROMPT):
            ids = prompts.tokens(sample, self.config.look.mode == "inline")
        if (shown := ids.count(prompts.image_token_id)) != 1:
            where = f"model.path={self.config.model.path}"
            raise UserError(f"{where}: the chat template shows {shown} images for one; correct it")
        text = len(ids) - 1
        try:
            image = prompts.image_tokens(sample.height, sample.width)
        except ValueError as error:  # as Qwen's, which takes no image that is 200 times as long as it is wide
            raise DataError(f"the image does not fit the policy's processor ({error}); crop it", "size") from error
        further = _further_passes(self.config, prompts, sample.task)
        needed = text + image + rollout.max_new_tokens + further
        if needed > rollout.max_model_len:
            terms = f"{text} text tokens + {image} image tokens + {rollout.max_new_tokens=}"
            terms += f" + {further} of further looks" if further else ""
            smaller = " or lower model.max_pixels" if prompts.native else ""
            raise DataError(f"{rollout.max_model_len=} is too short; raise it to {needed} = {terms}{smaller}", "length")


def _rewarded(config: Config) -> dict[str, tuple[frozenset[Truth], str]]:
    """The truth that training samples need, and why, by task."""
    looks: frozenset[Truth] = frozenset({"masks"}) if config.look.mode == "relook" else frozenset()
    measures = f"reward={config.reward.name}" + (f" with look={config.look.mode}" if looks else "")
    return dict.fromkeys(config.task, (needed_truth(config.reward) | looks, f"{measures} is measured by them"))


def _evaluated(config: Config) -> dict[str, tuple[frozenset[Truth], str]]:
    """The truth that held-out samples need, and why, by task."""

    def needed(name: str, task: TaskConfig) -> tuple[frozenset[Truth], str]:
        metrics = TASKS[task.form or name].metrics
        return needs(held_out_terms(metrics)), f"task {name} is evaluated by {', '.join(metrics)}"

    return {name: needed(name, task) for name, task in config.task.items()}


def _further_passes(config: Config, prompts: PromptMaker, task: str) -> int:
    """Tokens that the looks after the first may need: the request, the view and another answer, each time."""
    if config.look.mode != "relook":
        return 0
    side = math.isqrt(config.look.pixels)
    request = len(prompts.again(task)) - 1 + prompts.image_tokens(side, side)
    return (config.look.max_passes - 1) * (request + config.rollout.max_new_tokens)


def _longest(data: Dataset, prompts: PromptMaker) -> Iterable[Sample]:
    """The sample whose question has most tokens. Most questions need not be encoded: a token is at least a byte of the
    normalised text, in which a space may become three and three may come before the first word."""
    distinct: dict[str, int] = {}
    for place, record in enumerate(data.records):
        distinct.setdefault(clean(record.question), place)
    normalizer = prompts.tokenizer.backend_tokenizer.normalizer

    def limit(question: str) -> int:
        normal = normalizer.normalize_str(question) if normalizer else question
        return len(normal.encode()) + 2 * normal.count(" ") + 3

    most, found = -1, 0
    for most_possible, question in sorted(((limit(one), one) for one in distinct), reverse=True):
        if most_possible <= most:
            break
        if (count := len(prompts.spelled(question))) > most:
            most, found = count, distinct[question]
    return islice(data.usable(found), 1)


def _decode(samples: Sequence[Sample]) -> None:
    for image in {one.key: one for one in map(handle, samples)}.values():
        pixels(image, fetch)
