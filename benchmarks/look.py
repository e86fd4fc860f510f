"""What looking costs and gains: gIoU, tokens and seconds of each way of looking, on the same scenes and checkpoint.

    python -m benchmarks.look [--samples 256] [--answers 4] [--rounds 3] [--json] [overrides as for launch.train]

The second look's calibration is learned on training scenes first (`launch/run/calibrate.py`) and frozen for the
held-out ones, as in any evaluation. `giou` is of answers sampled at the rollout temperature, by the reward's
`mask_iou`. A sample's tokens are all its row holds: prompt, image tokens and answers of every pass. Seconds are medians
over the rounds, in which the modes take turns; before each answer the prefix cache is cold. `gain` is paired by scene,
with its 95 % t-interval.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, get_args

import numpy as np
from scipy import stats

from benchmarks.common import options, print_result
from launch.run.calibrate import calibrate
from launch.run.checks import check_files, check_machine
from launch.run.command_line import told
from launch.run.config import compose
from launch.run.prompts import PromptMaker
from launch.run.samples import MAIN
from launch.run.step_metrics import look_metrics
from launch.run.system import System
from perception import metric_catalog as catalog
from perception.config import Config, LookMode
from perception.types import Group, ImageHandle, Prompt, Sample, SamplingSpec, Trajectory
from runtime import cluster
from synthetic.prepare import prepare

MODES: tuple[LookMode, ...] = get_args(LookMode)


@dataclass(slots=True)
class Mode:
    """What one way of looking did in all rounds."""

    ious: list[np.ndarray] = field(default_factory=list)
    """Per round (scenes,): mean over the scene's answers."""
    seconds: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    sampled: list[float] = field(default_factory=list)
    relook_rate: float = 0.0
    prefix_hit: float = 0.0

    def figures(self) -> dict[str, float]:
        return {
            "giou": round(float(np.mean(self.ious)), 4),
            "tokens_per_sample": round(float(np.mean(self.tokens)), 1),
            "sampled_tokens_per_sample": round(float(np.mean(self.sampled)), 1),
            "seconds": round(median(self.seconds), 2),
            "relook_rate": round(self.relook_rate, 3),
            "prefix_hit": round(self.prefix_hit, 3),
        }


async def measure(
    config: Config, train: Sequence[Sample], held_out: Sequence[Sample], answers: int, rounds: int
) -> Any:
    """Every mode's figures by name, and the paired differences (scenes,) of relook and none."""
    system = System(config)
    prompts = PromptMaker(config.model, config.task)
    modes = {mode: Mode() for mode in MODES}
    try:
        await system.start()
        if system.must_calibrate:
            await calibrate(system, train)
        rollout = config.rollout
        sampling = SamplingSpec(n=answers, temperature=rollout.temperature, max_new_tokens=rollout.max_new_tokens)
        for number in range(rounds):
            for mode in MODES:
                await _round(system, prompts, held_out, sampling, mode, modes[mode], number)
    finally:
        await system.shutdown()
    return modes, np.mean(modes["relook"].ious, axis=0) - np.mean(modes["none"].ious, axis=0)


async def _round(
    system: System,
    prompts: PromptMaker,
    samples: Sequence[Sample],
    sampling: SamplingSpec,
    mode: LookMode,
    into: Mode,
    number: int,
) -> None:
    await system.sync_weights(0)  # drops the prefix cache
    began = time.perf_counter()
    groups = await system.answer(system.prompts(samples, number, mode), sampling, mode=mode)
    into.seconds.append(time.perf_counter() - began)
    into.ious.append(np.array([_giou(group) for group in groups]))
    trajectories = [one for group in groups for one in group.trajectories]
    into.tokens.append(float(np.mean([row_tokens(t, prompts) for t in trajectories])))
    into.sampled.append(float(np.mean([t.sampled_tokens for t in trajectories])))
    if mode == "relook":
        looks = look_metrics(groups)
        into.relook_rate, into.prefix_hit = looks[catalog.RELOOK_RATE], looks[catalog.PREFIX_HITS]


def _giou(group: Group) -> float:
    """Mean mask IoU of a scene's answers; what was not measured counts 0."""
    return float(np.mean([one.score.metrics["mask_iou"] if one.score else 0.0 for one in group.trajectories]))


def row_tokens(trajectory: Trajectory, prompts: PromptMaker) -> int:
    """Tokens of a row: prompt, image tokens and answers of every pass."""
    images = [image for turn in trajectory.turns for image in turn.images]
    return _shown(images, prompts) + sum(len(turn.input_ids) + len(turn.token_ids) for turn in trajectory.turns)


def prompt_tokens(prompt: Prompt, prompts: PromptMaker) -> int:
    return _shown(prompt.images, prompts) + len(prompt.token_ids)


def _shown(images: Sequence[ImageHandle], prompts: PromptMaker) -> int:
    """Tokens that the images have beyond their placeholders."""
    return sum(prompts.image_tokens(image.height, image.width) - 1 for image in images)


def main() -> None:
    samples, answers, rounds = (256, "held-out scenes"), (4, "per scene"), (3, "of all modes")
    arguments = options(__doc__, overrides=True, samples=samples, answers=answers, rounds=rounds)
    own = ["recipe=quickstart", "look=relook", f"data.eval_samples={arguments.samples}", "run.name=look"]
    with told():
        config = compose([*own, *arguments.overrides])
        check_machine(config, say=lambda text: None)
        prepare(config, say=lambda text: None)
        train, held_out = check_files(config)
    cluster.connect(config.placement)
    modes, gains = asyncio.run(measure(config, train, held_out[MAIN], arguments.answers, arguments.rounds))
    figures: Mapping[str, dict[str, float]] = {name: mode.figures() for name, mode in modes.items()}
    ours, rival = figures["relook"], figures["none"]
    print_result(
        "look",
        ours,
        rival,
        round(ours["giou"] / rival["giou"], 3),
        vars(arguments),
        modes=figures,
        gain=round(float(gains.mean()), 4),
        gain_interval=round(float(stats.sem(gains) * stats.t.ppf(0.975, len(gains) - 1)), 4),
        token_ratio=round(ours["tokens_per_sample"] / rival["tokens_per_sample"], 3),
    )


if __name__ == "__main__":
    main()
