"""GRPO for models that see: sample groups, score them, rank the rewards, take a step, send the weights back.

python -m launch.train recipe=quickstart learner.lr=2e-5
python -m launch.train --multirun recipe=quickstart learner.lr=2e-5,5e-5
python -m launch.train recipe=quickstart run.resume=quickstart
ray job submit --working-dir . -- python -m launch.train recipe=quickstart
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.evaluate import evaluate_all
from launch.record.progress import Progress
from launch.record.recorder import Recorder
from launch.record.summary import show
from launch.report import write_report
from launch.run.batch import StepBatch, reward_kl
from launch.run.calibrate import calibrate
from launch.run.checks import check, toy_settings
from launch.run.config import entry
from launch.run.failures import check_failures
from launch.run.parity import parity_gate
from launch.run.prepare import prepare
from launch.run.state import RunState
from launch.run.step_metrics import StageClock, step_metrics
from launch.run.system import System
from perception import metric_catalog as catalog
from perception.config import Config
from perception.types import Sample, SamplingSpec
from reward_workers.combine import combine
from runtime import cluster


async def train(run: Session) -> None:
    """The algorithm. Ends after `algorithm.steps` steps, or after the current one once `stop` is set."""
    config, system, state = run.config, run.system, run.state
    algorithm, first = config.algorithm, run.state.step + 1
    sampling = SamplingSpec(
        n=algorithm.group_size,
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
    )
    for step in range(first, algorithm.steps + 1):
        clock, batch = StageClock(), StepBatch(algorithm)
        while missing := batch.missing:
            batch.samples += state.cursor.next(missing)
            prompts = system.prompts(batch.samples, step)[-missing:]  # a prompt's seed is its place in the step
            masks = config.run.rollouts_kept - len(batch.scored)
            with clock.generate_and_score() as sampled:
                scored = await system.answer(prompts, sampling, explore=True, masks=masks, on_sampled=sampled)
            check_failures([*batch.scored, *scored], config.reward.max_failure_rate)
            with clock.stage(catalog.SECONDS_LEARN):
                kl = await reward_kl(system.learner, scored, algorithm)
            batch.add(scored, combine(scored, config.reward, state.ranks), kl)
        advantages = batch.advantages()
        groups = batch.train_groups(advantages)
        if step == first:
            await parity_gate(system, batch.scored, run.progress)
        with clock.stage(catalog.SECONDS_LEARN):
            report = await system.learner.train_step(groups)
        if state.ranks is not None:
            state.ranks.flush()
        with clock.stage(catalog.SECONDS_SYNC):
            updates = await system.sync_weights(version=step)
        state.step = step
        metrics = step_metrics(batch.scored, batch.rewards, advantages, report, updates, clock)
        metrics |= batch.metrics(groups) | system.learn_to_look(batch.scored)
        run.recorder.step(step, metrics, batch.scored, batch.rewards, advantages.values)
        run.progress.step(step, metrics)
        if run.stop.is_set() or step == algorithm.steps or step % config.run.checkpoint_every == 0:
            await state.save(system, run.recorder.run_dir)
        if run.stop.is_set():
            return
        if config.run.eval_every and step % config.run.eval_every == 0 and step < algorithm.steps:
            await run.assess(f"evaluating after step {step}")


@dataclass(frozen=True, slots=True)
class Session:
    """Everything around the algorithm."""

    config: Config
    samples: Sequence[Sample]
    held_out: Mapping[str, Sequence[Sample]]
    """By name; the first one, named "", is what a run is judged by."""
    state: RunState
    system: System
    recorder: Recorder
    progress: Progress
    stop: asyncio.Event
    """Set by Ctrl-C and SIGTERM."""

    async def assess(self, phase: str) -> dict[str, float]:
        """Evaluate the current policy on the held-out samples, and record it."""
        self.progress.phase(phase)
        metrics, groups = await evaluate_all(self.system, self.held_out, self.config.run.rollouts_kept)
        self.recorder.evaluation(self.state.step, metrics, groups)
        return metrics

    async def run(self) -> None:
        """Workers up, evaluation before and after, summary and exported policy, workers down."""
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self.stop.set)
        self.progress.phase("starting engine, SAM2 worker and learner")
        try:
            self.progress.say(await self.system.start())
            if self.state.step:
                await self.state.restore(self.system)
            if self.system.must_calibrate and not self.state.step:
                self.progress.phase("learning when to look again")
                self.progress.say(await calibrate(self.system, self.samples))
            if self.state.before is None:
                self.state.before = await self.assess("evaluating the starting policy")
            await train(self)
            if not self.stop.is_set():
                after = await self.assess("evaluating the trained policy")
                await self.system.export(self.recorder.run_dir.resolve() / "policy")
                self.recorder.summary(self.state.summary(after))
        finally:
            self.progress.phase("shutting down")
            await self.system.shutdown()


def run(config: Config) -> None:
    prepare(config, say=print)
    samples, held_out = check(config)
    for warning in toy_settings(config):
        print(f"warning: {warning}")
    state = RunState.resume(config, samples) if config.run.resume else RunState.fresh(config, samples)
    cluster.connect(config.placement)
    with (
        Recorder(config, resume_step=state.step if config.run.resume else None) as recorder,
        Progress(config.algorithm.steps) as progress,
    ):
        session = Session(config, samples, held_out, state, System(config), recorder, progress, asyncio.Event())
        asyncio.run(session.run())
    report = write_report(recorder.run_dir)
    show(recorder.run_dir)
    progress.say(f"report   {report}")


if __name__ == "__main__":
    entry(run)
