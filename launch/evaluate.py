"""Held-out evaluation: gIoU of greedy and of sampled answers, on the same fixed samples every time.

    python -m launch.evaluate recipe=quickstart model.path=runs/quickstart/policy

gIoU is the mean over samples of the IoU between the union of the predicted masks and the union of the true ones; an
answer that does not parse counts 0, no target rightly answered counts 1. `giou_greedy` is at temperature 0,
`giou_sampled` at the rollout temperature, the mean over several answers per sample (Dr. Seg evaluates one sample at
temperature 1, unseeded).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from launch import cluster
from launch.config import entry
from launch.preflight import check
from launch.prepare import prepare
from launch.system import System
from perception.config import Config
from perception.types import Sample, SamplingSpec, ScoredGroup

EVALUATION_SEED_STEP = 0
"""Training steps count from 1, so evaluation draws from seeds of its own."""
SAMPLED_ANSWERS = 4
HELD_OUT = ("mask_iou",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    giou_greedy: float
    giou_sampled: float
    parse_ok: float
    """Share of the sampled answers that parse."""
    samples: int
    groups: tuple[ScoredGroup, ...]
    """The greedy answers, for pictures."""

    def metrics(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("giou_greedy", "giou_sampled", "parse_ok", "samples")}


async def evaluate(system: System, samples: Sequence[Sample], pictures: int = 0) -> Evaluation:
    """Both ways of answering, over all samples. Scorer failures raise: a held-out number is whole or absent."""
    prompts = system.prompts(samples, EVALUATION_SEED_STEP)
    rollout = system.config.rollout
    ways = (
        SamplingSpec(n=1, temperature=0.0, max_new_tokens=rollout.max_new_tokens),
        SamplingSpec(n=SAMPLED_ANSWERS, temperature=rollout.temperature, max_new_tokens=rollout.max_new_tokens),
    )
    greedy, sampled = [await system.answer(prompts, way, masks=pictures, metrics=HELD_OUT) for way in ways]
    return Evaluation(
        giou_greedy=_mean_iou(greedy),
        giou_sampled=_mean_iou(sampled),
        parse_ok=float(np.mean([score.answer.failure is None for entry in sampled for score in entry.scores])),
        samples=len(samples),
        groups=tuple(greedy),
    )


def _mean_iou(scored: Sequence[ScoredGroup]) -> float:
    for one in scored:
        for score in one.scores:
            if score.failure is not None and "mask_iou" not in score.metrics:
                raise RuntimeError(f"evaluation of {one.group.prompt.sample.id}: {score.failure.detail}")
    return float(np.mean([score.metrics["mask_iou"] for one in scored for score in one.scores]))


async def _evaluate_once(config: Config, held_out: Sequence[Sample]) -> Evaluation:
    system = System(config)
    try:
        await system.start()
        return await evaluate(system, held_out)
    finally:
        await system.shutdown()


def run(config: Config) -> None:
    prepare(config, say=print)
    _, held_out = check(config)
    cluster.connect(config.placement)
    print(json.dumps(asyncio.run(_evaluate_once(config, held_out)).metrics()))


if __name__ == "__main__":
    entry(run)
