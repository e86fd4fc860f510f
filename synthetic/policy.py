"""Supervised warm start of a mini policy, from random weights, on the synthetic world.

Fresh scenes are drawn as they are needed, from seeds that no data set on disk uses; only the answer's tokens are
trained on.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import DataCollatorForSeq2Seq

from launch.run.prompts import PromptMaker
from learner import vision_attention
from perception.config import LookConfig, ModelConfig, TaskConfig
from perception.frames import Frame
from perception.tasks import TASKS
from synthetic import policies
from synthetic.dialogues import Dialogue, one_look, sample_of, two_looks
from synthetic.scenes import WORLD, SceneStyle, ask, generate

SEED_BASE = 1_000_000_000
"""First scene seed of supervised training; data sets on disk use small seeds."""
SEEDS_PER_RUN = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStart:
    """Settings of the policy's training; the defaults are those of the shipped model."""

    steps: int = 3000
    batch: int = 64
    lr: float = 2e-3
    warmup: int = 200
    seed: int = 0
    save_every: int = 250
    second_looks: int = 22
    """Dialogues of a batch that are about a second look; of the others, half have the form of `look=inline`."""


def train_policy(out: Path, config: WarmStart, tasks: dict[str, TaskConfig]) -> None:
    """Train a mini policy and save it, tokenizer and processor included, under `out`."""
    tokenizer = policies.make_tokenizer(corpus(WORLD, tasks))
    shape = policies.SHAPES["mini"]
    model = policies.make_model(shape, tokenizer, config.seed)
    policies.save(model, tokenizer, out, shape.max_side)
    model.model.visual.config._attn_implementation_internal = vision_attention.NAME
    prompts = PromptMaker(ModelConfig(path=str(out), segmenter=""), tasks)
    batches = iter(DataLoader(_Batches(config, prompts), batch_size=None, num_workers=1, prefetch_factor=8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config))
    started, losses = time.monotonic(), []
    for step in range(1, config.steps + 1):
        loss = 0.0
        for half in next(batches):
            part = model(**half).loss * (len(half["input_ids"]) / config.batch)
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        if step % 100 == 0:
            rate = step * config.batch / (time.monotonic() - started)
            at = f"step {step}/{config.steps}"
            print(f"{at}  loss {np.mean(losses[-100:]):.4f}  {rate:.0f} samples/s", flush=True)
        if step % config.save_every == 0 or step == config.steps:
            model.save_pretrained(out)


def _rate(step: int, config: WarmStart) -> float:
    """Linear warm-up, then a cosine to a twentieth."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def corpus(style: SceneStyle, tasks: dict[str, TaskConfig]) -> Iterator[str]:
    """Texts a tokenizer for the synthetic world is trained on."""
    for form in tasks.values():
        yield from [f"system\n{form.system}\nuser\nassistant\n{form.template}{form.inline}{form.again}"] * 50
    for seed in range(SEED_BASE - 4000, SEED_BASE):
        scene = generate(seed, style)
        question = ask(scene, np.random.default_rng(seed), style)
        sample = sample_of(scene, question)
        answer = TASKS[sample.task].write(sample.target, Frame(sample.height, sample.width))
        yield tasks[sample.task].template.replace("{question}", sample.question) + answer


class _Batches(IterableDataset):
    """Pairs of half-batches, one look and two looks: rows of like length, so that little is padding."""

    def __init__(self, config: WarmStart, prompts: PromptMaker) -> None:
        self._config, self._prompts = config, prompts

    def __iter__(self) -> Iterator[list[dict[str, torch.Tensor]]]:
        torch.set_num_threads(1)
        config, look = self._config, LookConfig()
        first = SEED_BASE + config.seed * SEEDS_PER_RUN
        for start in count(first, config.batch):
            second, end = start + config.second_looks, start + config.batch
            once = [one_look(s, WORLD, self._prompts, bool(s % 2)) for s in range(second, end)]
            twice = [two_looks(s, WORLD, self._prompts, look) for s in range(start, second)]
            yield [self._collate(half) for half in (once, twice) if half]

    def _collate(self, dialogues: Sequence[Dialogue]) -> dict[str, torch.Tensor]:
        """Right-padded rows, labels on the last completion only."""
        tokenizer, image_id = self._prompts.tokenizer, self._prompts.image_token_id
        images = self._prompts.processor.image_processor
        pixels = images(images=[image for d in dialogues for image in d.images], return_tensors="pt")
        sizes = iter((pixels["image_grid_thw"].prod(-1) // images.merge_size**2).tolist())
        examples = []
        for dialogue in dialogues:
            row: list[int] = []
            for input_ids, completion in zip(dialogue.input_ids, dialogue.completions, strict=True):
                for token in input_ids:
                    row += [token] * (next(sizes) if token == image_id else 1)
                start = len(row)
                row += [*tokenizer.encode(completion, add_special_tokens=False), tokenizer.eos_token_id]
            examples.append({"input_ids": row, "labels": [-100] * start + row[start:]})
        padded = DataCollatorForSeq2Seq(tokenizer)(examples)
        return {**padded, **pixels, "mm_token_type_ids": (padded["input_ids"] == image_id).int()}
