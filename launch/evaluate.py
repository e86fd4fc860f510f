"""Held-out evaluation: gIoU of greedy and of sampled answers, on the same fixed samples every time.

    python -m launch.evaluate recipe=quickstart model.path=runs/quickstart/policy

gIoU is the mean over samples of the IoU between the union of the predicted masks and the union of the true ones; an
answer that does not parse counts 0, no target rightly answered counts 1. `giou_greedy` is at temperature 0,
`giou_sampled` at the rollout temperature, the mean over several answers per sample (Dr. Seg evaluates one sample at
temperature 1, unseeded). Under `look=relook` the policy looks again as it does in training, without exploring, by the
calibration saved with it (`look.json`), and the answer it is most confident of counts; no truth is used for that.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from launch.run.calibrate import calibrate
from launch.run.checks import MAIN, check
from launch.run.config import entry
from launch.run.prepare import prepare
from launch.run.step_metrics import look_metrics
from launch.run.system import System
from perception import metric_catalog as catalog
from perception.config import Config
from perception.types import Sample, SamplingSpec, ScoredGroup
from runtime import cluster

EVALUATION_SEED_STEP = 0
"""Training steps count from 1, so evaluation draws from seeds of its own."""
SAMPLED_ANSWERS = 4
HELD_OUT = ("mask_iou",)


async def evaluate(
    system: System, samples: Sequence[Sample], pictures: int = 0
) -> tuple[dict[str, float], tuple[ScoredGroup, ...]]:
    """Metrics of both ways of answering over all samples, and the greedy answers for pictures.

    Scorer failures raise RuntimeError: a held-out number is whole or absent.
    """
    prompts = system.prompts(samples, EVALUATION_SEED_STEP)
    rollout = system.config.rollout
    ways = (
        SamplingSpec(n=1, temperature=0.0, max_new_tokens=rollout.max_new_tokens),
        SamplingSpec(n=SAMPLED_ANSWERS, temperature=rollout.temperature, max_new_tokens=rollout.max_new_tokens),
    )
    greedy, sampled = [await system.answer(prompts, way, masks=pictures, metrics=HELD_OUT) for way in ways]
    metrics = {
        catalog.GIOU_GREEDY: _mean_iou(greedy),
        catalog.GIOU_SAMPLED: _mean_iou(sampled),
        catalog.HELD_OUT_PARSE_OK: float(np.mean([s.answer.failure is None for one in sampled for s in one.scores])),
        catalog.HELD_OUT_SAMPLES: len(samples),
    }
    if system.config.look.mode == "relook":
        looks = look_metrics(sampled)
        metrics[catalog.HELD_OUT_RELOOK_RATE] = looks[catalog.RELOOK_RATE]
        metrics[catalog.HELD_OUT_LOOK_GAIN] = looks[catalog.RELOOK_GAIN] * looks[catalog.RELOOK_RATE]
    return metrics, tuple(greedy)


async def evaluate_all(
    system: System, held_out: Mapping[str, Sequence[Sample]], pictures: int = 0
) -> tuple[dict[str, float], tuple[ScoredGroup, ...]]:
    """Metrics of every held-out set by `names.held_out`, and the groups of the first one for pictures."""
    done = {name: await evaluate(system, samples, 0 if name else pictures) for name, samples in held_out.items()}
    metrics = {catalog.held_out(metric, name): v for name, (own, _) in done.items() for metric, v in own.items()}
    return metrics, done[MAIN][1]


def _mean_iou(scored: Sequence[ScoredGroup]) -> float:
    for one in scored:
        for score in one.scores:
            if score.failure is not None and "mask_iou" not in score.metrics:
                raise RuntimeError(f"evaluation of {one.group.prompt.sample.id}: {score.failure.detail}")
    return float(np.mean([score.metrics["mask_iou"] for one in scored for score in one.scores]))


async def _evaluate_once(
    config: Config, train: Sequence[Sample], held_out: Mapping[str, Sequence[Sample]]
) -> dict[str, float]:
    system = System(config)
    try:
        await system.start()
        if system.must_calibrate:
            print(await calibrate(system, train), file=sys.stderr)
        return (await evaluate_all(system, held_out))[0]
    finally:
        await system.shutdown()


def run(config: Config) -> None:
    prepare(config, say=print)
    train, held_out = check(config)
    cluster.connect(config.placement)
    print(json.dumps(asyncio.run(_evaluate_once(config, train, held_out))))


if __name__ == "__main__":
    entry(run)
