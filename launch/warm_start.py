"""Supervised warm start of a mini policy, from random weights, on the synthetic world.

Fresh scenes are drawn as they are needed, from seeds that no data set on disk uses; only the answer's tokens are
trained on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import Qwen2VLImageProcessor

from launch import policies
from launch.prompts import PromptMaker
from learner import vision_attention
from perception.config import ModelConfig, TaskConfig
from perception.dialogue import ideal_completion
from perception.scenes import SceneStyle, ask, generate

SEED_BASE = 1_000_000_000
"""First scene seed of supervised training; data sets on disk use small seeds."""
SEEDS_PER_RUN = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStart:
    steps: int = 2200
    batch: int = 64
    lr: float = 2e-3
    warmup: int = 200
    seed: int = 0
    save_every: int = 250
    style: SceneStyle = field(default_factory=lambda: SceneStyle(max_objects=3))


def train_policy(out: Path, config: WarmStart, tasks: dict[str, TaskConfig], log: Callable[[str], None]) -> None:
    """Train a mini policy and save it, tokenizer and processor included, under `out`."""
    tokenizer = policies.make_tokenizer(corpus(config.style, tasks))
    shape = policies.SHAPES["mini"]
    model = policies.make_model(shape, tokenizer, config.seed)
    policies.save(model, tokenizer, out, shape.max_side)
    model.model.visual.config._attn_implementation_internal = vision_attention.NAME
    prompts = PromptMaker(ModelConfig(path=str(out), segmenter=""), tasks)
    batches = iter(DataLoader(_Dialogues(out, config, prompts), batch_size=None, num_workers=1, prefetch_factor=8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config))
    started, losses = time.monotonic(), []
    for step in range(1, config.steps + 1):
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 100 == 0:
            rate = step * config.batch / (time.monotonic() - started)
            log(f"step {step}/{config.steps}  loss {np.mean(losses[-100:]):.4f}  {rate:.0f} samples/s")
        if step % config.save_every == 0 or step == config.steps:
            model.save_pretrained(out)


def _rate(step: int, config: WarmStart) -> float:
    """Linear warm-up, then a cosine to a twentieth."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def _dialogue(seed: int, style: SceneStyle) -> tuple[np.ndarray, str, str, str]:
    """(image, question, task, ideal completion) of one scene."""
    scene = generate(seed, style)
    question = ask(scene, np.random.default_rng(seed), style)
    targets = [scene.objects[i] for i in question.targets]
    answer = ideal_completion([t.box for t in targets], [t.point for t in targets], style.side, style.side)
    return scene.image, question.text, question.task, answer


def corpus(style: SceneStyle, tasks: dict[str, TaskConfig]) -> Iterator[str]:
    """Texts a tokenizer for the synthetic world is trained on."""
    for templates in tasks.values():
        yield from [f"system\n{templates.system}\nuser\nassistant\n{templates.template}"] * 50
    for seed in range(SEED_BASE - 4000, SEED_BASE):
        _, question, task, answer = _dialogue(seed, style)
        yield tasks[task].template.replace("{question}", question) + answer


class _Dialogues(IterableDataset):
    """Batches ready for the model: right-padded, labels only on the completion."""

    def __init__(self, policy: Path, config: WarmStart, prompts: PromptMaker) -> None:
        self._config, self._prompts = config, prompts
        self._processor = Qwen2VLImageProcessor.from_pretrained(policy)
        self._image_tokens = (config.style.side // (policies.PATCH * 2)) ** 2

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        torch.set_num_threads(1)
        tokenizer = self._prompts.tokenizer
        image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        first = SEED_BASE + self._config.seed * SEEDS_PER_RUN
        for start in count(first, self._config.batch):
            images, rows, prompt_lengths = [], [], []
            for seed in range(start, start + self._config.batch):
                image, question, task, answer = _dialogue(seed, self._config.style)
                prompt = list(self._prompts.tokens(question, task))
                at = prompt.index(image_id)
                prompt[at : at + 1] = [image_id] * self._image_tokens
                images.append(image)
                rows.append(prompt + tokenizer.encode(answer, add_special_tokens=False) + [tokenizer.eos_token_id])
                prompt_lengths.append(len(prompt))
            yield self._collate(images, rows, prompt_lengths, tokenizer.pad_token_id, image_id)

    def _collate(
        self, images: list[np.ndarray], rows: list[list[int]], prompt_lengths: list[int], pad: int, image_id: int
    ) -> dict[str, torch.Tensor]:
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), pad)
        labels = torch.full((len(rows), width), -100)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, (row, start) in enumerate(zip(rows, prompt_lengths, strict=True)):
            ids[i, : len(row)] = torch.tensor(row)
            labels[i, start : len(row)] = ids[i, start : len(row)]
            mask[i, : len(row)] = 1
        pixels = self._processor(images=images, return_tensors="pt")
        return {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == image_id).int(),
            "pixel_values": pixels["pixel_values"],
            "image_grid_thw": pixels["image_grid_thw"],
        }
