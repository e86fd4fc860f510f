"""Groups as the rollout would hand them over, with random tokens: input for tests of the learner."""

from __future__ import annotations

import hashlib

import cv2
import numpy as np

from perception.types import (
    Group,
    ImageHandle,
    PolicySpec,
    Prompt,
    Sample,
    Target,
    TrainGroup,
    Trajectory,
    Turn,
    VersionSpan,
)


def image(rng: np.random.Generator, height: int = 56, width: int = 56) -> ImageHandle:
    """A PNG of noise, its bytes in the handle."""
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    encoded = cv2.imencode(".png", pixels)[1].tobytes()
    return ImageHandle(key=hashlib.sha256(encoded).hexdigest(), height=height, width=width, ref=encoded)


def train_group(
    spec: PolicySpec,
    rng: np.random.Generator,
    n: int = 4,
    prompt_tokens: int = 12,
    answer_tokens: int = 9,
    images: int = 1,
    turns: int = 1,
    side: int = 56,
    vocabulary: int = 256,
) -> TrainGroup:
    """One prompt, n answers of 1 .. answer_tokens tokens; later turns bring a second image and more text."""

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocabulary, length).tolist())

    first = tuple(image(rng, side, side) for _ in range(images))
    token_ids = ids(3) + (spec.image_token_id, 5) * images + ids(prompt_tokens)
    sample = Sample(
        id=f"s{rng.integers(1 << 30)}",
        image_path="",
        height=side,
        width=side,
        question="",
        task="segment",
        target=Target(boxes=np.zeros((0, 4), np.float32), points=np.zeros((0, 2), np.float32)),
    )
    prompt = Prompt(sample=sample, token_ids=token_ids, images=first, answer_height=side, answer_width=side, seed=0)

    def turn(fed: tuple[int, ...], fed_images: tuple[ImageHandle, ...]) -> Turn:
        answer = ids(int(rng.integers(1, answer_tokens + 1)))
        return Turn(
            input_ids=fed,
            images=fed_images,
            token_ids=answer,
            text="",
            finish_reason="stop",
            logprobs=tuple(rng.uniform(-7.0, -4.0, len(answer)).tolist()),
            versions=(VersionSpan(version=0, start=0, end=len(answer)),),
        )

    def trajectory(index: int) -> Trajectory:
        later = [turn((*ids(4), spec.image_token_id, *ids(2)), (image(rng, 28, 84),)) for _ in range(turns - 1)]
        return Trajectory(index=index, turns=(turn(token_ids, first), *later))

    group = Group(prompt=prompt, trajectories=tuple(trajectory(i) for i in range(n)))
    return TrainGroup(group=group, advantages=tuple(rng.normal(size=n).tolist()))
