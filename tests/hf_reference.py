"""The same questions put to transformers directly: prompts, log-probs and weight buckets to hold the engine against."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from perception.types import PolicySpec, Prompt
from perception.weights import TensorSlot, WeightBucket
from tests import builders
from tests.tiny_policy import IMAGE_TOKENS


@dataclass
class Reference:
    policy: PolicySpec

    def __post_init__(self) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(self.policy.path, dtype=torch.float32).eval()
        self.processor: Any = AutoProcessor.from_pretrained(self.policy.path)

    def prompt(self, seed: int, images: int = 1) -> Prompt:
        text = f"<|im_start|>user\n{IMAGE_TOKENS * images}Where is it?<|im_end|>\n<|im_start|>assistant\n"
        return builders.prompt(
            builders.sample(f"s{seed}", height=112, width=140, question="Where is it?", task="ground"),
            token_ids=tuple(self.processor.tokenizer(text).input_ids),
            images=tuple(builders.noise_image(seed + i, 112, 140) for i in range(images)),
            seed=seed,
        )

    @torch.no_grad()
    def logprobs(self, prompt: Prompt, token_ids: tuple[int, ...], temperature: float) -> np.ndarray:
        """(len(token_ids), vocabulary) log-probs of every next token under the mask and the temperature."""
        pictures = [Image.open(io.BytesIO(handle.ref)) for handle in prompt.images]
        inputs = dict(self.processor.image_processor(images=pictures, return_tensors="pt"))
        sizes = iter((inputs["image_grid_thw"].prod(-1) // 4).tolist())  # patches are merged 2 x 2
        row: list[int] = []
        for token in prompt.token_ids:
            row += [token] * (next(sizes) if token == self.policy.image_token_id else 1)
        length = len(row)
        inputs["input_ids"] = torch.tensor([[*row, *token_ids]])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.policy.image_token_id).int()
        logits = self.model(**inputs).logits[0, length - 1 : -1]
        logits[:, list(self.policy.banned_token_ids)] = -torch.inf
        return torch.log_softmax(logits / temperature, -1).numpy()

    def perturb(self, seed: int) -> None:
        """Change every parameter, norms and biases included."""
        perturb(self.model, seed)

    def buckets(self, limit: int = 400_000) -> Iterator[WeightBucket]:
        """All parameters, in buckets of at least `limit` bytes."""
        return buckets(self.model, limit)


@torch.no_grad()
def perturb(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += 0.03 * torch.randn(parameter.shape, generator=generator)


def buckets(model: torch.nn.Module, limit: int = 400_000) -> Iterator[WeightBucket]:
    slots: list[TensorSlot] = []
    data = bytearray()
    for name, parameter in model.named_parameters():
        data += b"\0" * (-len(data) % 16)
        slots.append(TensorSlot(name=name, dtype="float32", shape=tuple(parameter.shape), offset=len(data)))
        data += parameter.detach().numpy().tobytes()
        if len(data) >= limit:
            yield _bucket(slots, data)
            slots, data = [], bytearray()
    if slots:
        yield _bucket(slots, data)


def _bucket(slots: list[TensorSlot], data: bytearray) -> WeightBucket:
    payload = np.frombuffer(bytes(data), np.uint8)
    return WeightBucket(slots=tuple(slots), nbytes=len(data), transport="store", payload=payload)
