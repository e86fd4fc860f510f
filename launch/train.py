"""GRPO for models that see: sample groups, score them, rank the rewards, take a step, send the weights back.

python -m launch.train recipe=quickstart learner.lr=2e-5
python -m launch.train --multirun learner.lr=2e-5,5e-5
python -m launch.train recipe=quickstart run.resume=quickstart
ray job submit --working-dir . -- python -m launch.train recipe=quickstart
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence

from launch import cluster
from launch.config import entry
from launch.evaluate import evaluate
from launch.metrics import StageClock, step_metrics
from launch.parity import parity_gate
from launch.preflight import check
from launch.prepare import prepare
from launch.progress import Progress
from launch.recorder import Recorder
from launch.report import write_report
from launch.runstate import RunState
from launch.system import System
from learner.advantages import step_advantages
from perception import names
from perception.config import Config
from perception.types import Sample, SamplingSpec, TrainGroup
from reward_workers.rewards import combine


async def train(system: System, state: RunState, recorder: Recorder, progress: Progress, stop: asyncio.Event) -> None:
    """The algorithm. Ends after `algorithm.steps` steps, or after the current one when `stop` is set."""
    config = system.config
    algorithm = config.algorithm
    sampling = SamplingSpec(
        n=algorithm.group_size,
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
    )
    first = state.step + 1
    for step in range(first, algorithm.steps + 1):
        clock = StageClock()
        prompts = system.prompts(state.cursor.next(algorithm.prompts_per_step), step)
        with clock.generate_and_score() as sampled:
            scored = await system.answer(prompts, sampling, masks=config.run.rollouts_kept, on_sampled=sampled)
        rewards = combine(scored, config.reward, state.ranks)
        advantages = step_advantages(scored, rewards, algorithm.scale)
        if step == first:
            await parity_gate(system, scored, progress)
        with clock.stage(names.SECONDS_LEARN):
            batch = [TrainGroup(group=s.group, advantages=a) for s, a in zip(scored, advantages.values, strict=True)]
            report = await system.learner.train_step(batch)
        if state.ranks is not None:
            state.ranks.flush()
        with clock.stage(names.SECONDS_SYNC):
            updates = await system.sync_weights(version=step)
        state.step = step
        metrics = step_metrics(scored, rewards, advantages, report, updates, clock)
        recorder.step(step, metrics, scored, rewards, advantages.values)
        progress.step(step, metrics)
        if stop.is_set() or step == algorithm.steps or step % config.run.checkpoint_every == 0:
            await state.save(system, recorder.run_dir)
        if stop.is_set():
            return


async def session(
    config: Config, held_out: Sequence[Sample], recorder: Recorder, state: RunState, progress: Progress
) -> None:
    """Everything around the algorithm: workers up, evaluation before and after, summary and report, workers down."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    progress.phase("starting engine, SAM2 worker and learner")
    system = System(config)
    try:
        await system.start()
        if state.step:
            await state.restore(system)
        if state.before is None:
            progress.phase("evaluating the starting policy")
            evaluation = await evaluate(system, held_out, config.run.rollouts_kept)
            recorder.evaluation(0, evaluation.metrics(), evaluation.groups)
            state.before = evaluation.metrics()
        await train(system, state, recorder, progress, stop)
        if not stop.is_set():
            progress.phase("evaluating the trained policy")
            evaluation = await evaluate(system, held_out, config.run.rollouts_kept)
            recorder.evaluation(state.step, evaluation.metrics(), evaluation.groups)
            await system.learner.export(str(recorder.run_dir.resolve() / "policy"))
            recorder.summary(state.summary(evaluation.metrics()))
    finally:
        progress.phase("shutting down")
        await system.shutdown()


def run(config: Config) -> None:
    prepare(config, say=print)
    samples, held_out = check(config)
    state = RunState.resume(config, samples) if config.run.resume else RunState.fresh(config, samples)
    cluster.connect(config.placement)
    with (
        Recorder(config, resume_step=state.step if config.run.resume else None) as recorder,
        Progress(config.algorithm.steps) as progress,
    ):
        asyncio.run(session(config, held_out, recorder, state, progress))
    report = write_report(recorder.run_dir)
    progress.say(f"report: {report}")


if __name__ == "__main__":
    entry(run)
