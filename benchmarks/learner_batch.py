"""The batch of `benchmarks.learner`: a policy of random weights, and groups with random answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launch.run.prompts import read_policy_spec
from perception.config import ModelConfig
from perception.types import Group, PolicySpec, Trajectory
from synthetic import policies
from tests import builders

TASK = "ground"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    model: str
    """One of `synthetic.policies.SHAPES`."""
    side: int
    """Side of the square images, pixels."""
    prompt_tokens: int
    """Expanded: image tokens included."""
    answer_tokens: int
    groups: int
    n: int = 8


SHAPES = {
    "toy": BatchShape(model="mini", side=364, prompt_tokens=192, answer_tokens=64, groups=8),
    "3b": BatchShape(model="3b", side=840, prompt_tokens=923, answer_tokens=384, groups=4),
    "7b": BatchShape(model="7b", side=840, prompt_tokens=923, answer_tokens=384, groups=4),
}


def write_policy(shape: BatchShape, folder: Path, dtype: str) -> None:
    """A policy of random weights in Hugging Face format; its image processor leaves the batch's images as they are."""
    of_model = dataclasses.replace(policies.SHAPES[shape.model], dtype=dtype)
    tokenizer = policies.make_tokenizer(["user\nassistant\n0123456789"])
    side = max(of_model.max_side, shape.side)
    policies.save(policies.make_model(of_model, tokenizer, seed=0), tokenizer, folder, side)


def read_policy(folder: Path, dtype: str) -> PolicySpec:
    """No id is banned: a rival's softmax knows of no such thing."""
    model = ModelConfig(path=str(folder), segmenter="", dtype=dtype)  # type: ignore[arg-type]
    return dataclasses.replace(read_policy_spec(model), banned_token_ids=())


def make_groups(shape: BatchShape, policy: PolicySpec, seed: int = 0) -> list[Group]:
    """Groups of `n` answers of equal length: noise for images, digits for questions, ordinary ids for answers.

    Advantages are standardised within the group; log-probs are 0 until `on_policy`.
    """
    from transformers import AutoTokenizer

    rng = np.random.default_rng(seed)
    tokenizer = AutoTokenizer.from_pretrained(policy.path)
    vocabulary = policies.SHAPES[shape.model].text["vocab_size"]
    special = tokenizer.convert_tokens_to_ids(list(policies.SPECIAL))
    ordinary = np.setdiff1d(np.arange(vocabulary), special)

    def encode(question: str) -> tuple[int, ...]:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    image_tokens = (shape.side // (2 * policies.PATCH)) ** 2
    digits = shape.prompt_tokens - image_tokens - len(encode("")) + 1

    def group(number: int) -> Group:
        question = "".join(str(digit) for digit in rng.integers(0, 10, digits))
        image = builders.noise_image(rng, shape.side, shape.side)
        asked = builders.sample(str(number), height=shape.side, width=shape.side, question=question, task=TASK)
        prompt = builders.prompt(asked, token_ids=encode(question), images=(image,), seed=number)
        answers = [rng.choice(ordinary, shape.answer_tokens).tolist() for _ in range(shape.n)]
        turns = [
            builders.turn(
                token_ids=answer,
                input_ids=prompt.token_ids,
                images=prompt.images,
                logprobs=(0.0,) * shape.answer_tokens,
                finish_reason="length",
            )
            for answer in answers
        ]
        rewards = rng.normal(size=shape.n)
        advantages = (rewards - rewards.mean()) / rewards.std(ddof=1)
        made = builders.group(*map(builders.trajectory, turns), about=prompt)
        return builders.with_advantages(made, advantages.tolist())

    return [group(number) for number in range(shape.groups)]


def on_policy(groups: Sequence[Group], logprobs: Sequence[Sequence[np.ndarray]]) -> list[Group]:
    """The same groups as if these log-probs (per group and trajectory) had been the engine's."""

    def filled(trajectory: Trajectory, values: np.ndarray) -> Trajectory:
        turn = dataclasses.replace(trajectory.turns[0], logprobs=tuple(values.tolist()))
        return dataclasses.replace(trajectory, turns=(turn,))

    return [
        dataclasses.replace(group, trajectories=tuple(map(filled, group.trajectories, of_group)))
        for group, of_group in zip(groups, logprobs, strict=True)
    ]
