"""Held-out evaluation: every task's own metrics, of greedy and of sampled answers, always on the same samples.

    python -m launch.evaluate recipe=quickstart model.path=runs/quickstart/policy

A task names what it is measured by (`perception.tasks`): gIoU for segment, the mean over samples of the IoU between the
union of the predicted masks and the union of the true ones; Acc@0.5 for ground; exact counts for count. An answer that
does not parse counts 0. `greedy` is at temperature 0, `sampled` at the rollout temperature, the mean over several
answers per sample (Dr. Seg evaluates one sample at temperature 1, unseeded). Under `look=relook` the policy looks again
as it does in training, without exploring, by the calibration saved with it (`look.json`), and the answer it is most
confident of counts; no truth is used for that.
"""

import asyncio
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from rich.console import Console

from launch.record.progress import Progress
from launch.record.summary import half_interval
from launch.run.calibrate import calibrate
from launch.run.checks import check_files, check_machine
from launch.run.config import entry
from launch.run.looking import sampled
from launch.run.models import located
from launch.run.samples import MAIN
from launch.run.step_metrics import look_metrics
from launch.run.system import System
from perception import metric_catalog as catalog
from perception.config import Config
from perception.datasets import stated
from perception.errors import DataError, UserError
from perception.types import Group, Sample, Score, Trajectory
from runtime import cluster
from synthetic.prepare import prepare

EVALUATION_SEED_STEP = 0
"""Training steps count from 1, so evaluation draws from seeds of its own."""
SAMPLED_ANSWERS = 4
log = logging.getLogger(__name__)

Sets = Mapping[str, Sequence[Sample]]
"""Held-out samples by the name of their set."""


async def evaluate(
    system: System, samples: Sequence[Sample], held_out: str = MAIN, pictures: int = 0
) -> tuple[dict[str, float], list[Group]]:
    """Metrics by `catalog.HeldOut.name`, and the greedy answers for pictures.

    A held-out number is whole or absent: of a task of which an answer could not be measured there is none, and a
    warning says why.
    """
    prompts = system.prompts(samples, EVALUATION_SEED_STEP)
    several = sampled(SAMPLED_ANSWERS, system.config.rollout)
    ways = {catalog.GREEDY: replace(several, n=1, temperature=0.0), catalog.SAMPLED: several}
    answered = {way: await system.answer(prompts, spec, masks=pictures, held_out=True) for way, spec in ways.items()}
    metrics: dict[str, float] = {}
    for task in sorted({sample.task for sample in samples}):
        own = {way: [group for group in groups if group.prompt.sample.task == task] for way, groups in answered.items()}
        try:
            measured = _measured(own, relooks=system.config.look.mode == "relook")
        except DataError as error:
            log.warning(f"no held-out numbers of task {task}{held_out and f' of {held_out}'}: {error}")
            continue
        metrics |= {catalog.HeldOut(task, *key, held_out).name: value for key, value in measured.items()}
    return metrics, answered[catalog.GREEDY]


async def evaluate_all(system: System, held_out: Sets, pictures: int = 0) -> tuple[dict[str, float], list[Group]]:
    """Metrics of every held-out set, and the groups of the first one for pictures."""
    done = {name: await evaluate(system, samples, name, 0 if name else pictures) for name, samples in held_out.items()}
    metrics = {name: value for own, _ in done.values() for name, value in own.items()}
    return metrics, done[MAIN][1]


def _measured(groups: Mapping[str, Sequence[Group]], relooks: bool) -> dict[tuple[str, str], float]:
    """(measure, way) -> mean over all answers."""
    scores = {way: [_score(group, one) for group in own for one in group.trajectories] for way, own in groups.items()}
    found = {
        (name, way): float(np.mean([score.metrics[name] for score in own]))
        for way, own in scores.items()
        for name in own[0].metrics
    }
    greedy, several = scores[catalog.GREEDY], scores[catalog.SAMPLED]
    for name in greedy[0].metrics if len(greedy) > 1 else ():
        found[name, catalog.INTERVAL] = half_interval([score.metrics[name] for score in greedy])
    found[catalog.PARSED, catalog.SAMPLED] = float(np.mean([score.best.answer.failure is None for score in several]))
    if relooks:
        looks = look_metrics(groups[catalog.SAMPLED])
        found[catalog.LOOK_RATE, catalog.SAMPLED] = looks[catalog.RELOOK_RATE]
        if any(candidate.mask_iou is not None for score in several for candidate in score.candidates):
            found[catalog.LOOK_GAIN, catalog.SAMPLED] = looks[catalog.RELOOK_GAIN] * looks[catalog.RELOOK_RATE]
    return found | {(catalog.SAMPLES, catalog.SAMPLED): float(len(groups[catalog.SAMPLED]))}


def _score(group: Group, trajectory: Trajectory) -> Score:
    if trajectory.score is None:
        why = trajectory.failure.detail if trajectory.failure else "it was not scored"
        raise DataError(f"sample {group.prompt.sample.id}: {why}")
    return trajectory.score


async def _evaluate_once(config: Config, train: Sequence[Sample], held_out: Sets) -> dict[str, float]:
    system = System(config)
    try:
        if system.must_calibrate and not train:
            raise UserError("look=relook has yet to learn when to look again: give data.train or look.calibration=0")
        await system.start(learner=False)
        if system.must_calibrate:
            print(await calibrate(system, train), file=sys.stderr)
        return (await evaluate_all(system, held_out))[0]
    finally:
        await system.shutdown()


def run(config: Config) -> None:
    with Progress(console=Console(stderr=True)) as progress:
        config = located(config)
        check_machine(config, say=print)
        prepare(config, say=progress.phase)
        if config.look.mode != "relook":  # else it may have to learn when to look again
            config = replace(config, data=replace(config.data, train=""))
        train, held_out = check_files(config, progress.phase)
        progress.phase("starting engine and SAM2 worker, evaluating")
        cluster.connect(config.placement, config.plugins)
        measured = asyncio.run(_evaluate_once(config, train, held_out))
    print(json.dumps({**measured, "data": stated(config.data)}))


if __name__ == "__main__":
    entry(run)
