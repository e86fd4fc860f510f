"""Session: everything around the algorithm of one run: workers, steps, records, checkpoints, evaluation, stopping."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.evaluate import evaluate_all
from launch.record import run_directory
from launch.record.card import write_card
from launch.record.progress import Progress
from launch.record.recorder import Recorder
from launch.run.alarms import ALARMS, Rule, example
from launch.run.batch import Batch, next_batch
from launch.run.calibrate import calibrate
from launch.run.checks import profiled
from launch.run.parity import parity_gate
from launch.run.pipeline import Pipeline
from launch.run.samples import left_out
from launch.run.state import RunState
from launch.run.step_metrics import look_metrics, step_metrics
from launch.run.system import Sync, System
from perception import metric_catalog as catalog
from perception.config import Config
from perception.errors import UserError
from perception.files import replacing
from perception.types import Group, LearnerReport, Sample


@dataclass(slots=True)
class Session:
    config: Config
    samples: Sequence[Sample]
    held_out: Mapping[str, Sequence[Sample]]
    """By name; the first one, named "", is what a run is judged by."""
    state: RunState
    system: System
    recorder: Recorder
    progress: Progress
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by Ctrl-C, SIGTERM and `run.stop_if`."""
    stepping: bool = False
    """A step is under way, and will be finished."""
    ended: bool = False
    """By a signal, now: what the workers do is left to Ray, which ends them with this process."""
    checked: bool = False
    """A batch has passed the parity gate."""
    met: Rule | None = None
    """The rule of `run.stop_if` that ends the run."""
    rules: list[Rule] = field(init=False)

    def __post_init__(self) -> None:
        self.rules = [Rule(text) for text in (*ALARMS, *self.config.run.stop_if)]

    def pipeline(self) -> Pipeline:
        return Pipeline(self.system, self.state.cursor, self.state.ledger)

    def steps(self) -> Iterator[int]:
        """Up to `algorithm.steps`, or the current one once `stop` is set."""
        for step in range(self.state.step + 1, self.config.algorithm.steps + 1):
            self.stepping = True
            self.progress.phase(f"step {step}", announce=False)
            yield step
            if self.stop.is_set():
                return
        self.stepping = False

    async def next_batch(self, scored: Pipeline, step: int) -> Batch:
        """Ranked, rewarded, advantaged. The first one that holds anything must pass the parity gate."""
        if step in profiled(self.config):
            await self.system.trace()
        batch = await next_batch(scored, step, self.config, self.system.learner, self.state.ranks)
        if not self.checked and any(one.learnable for group in batch.groups for one in group.trajectories):
            await parity_gate(self.system, batch.groups, self.progress.say)
            self.checked = True
        return batch

    async def finish(self, step: int, batch: Batch, report: LearnerReport, sync: Sync, scored: Pipeline) -> None:
        """End a step: calibrate, record, show, checkpoint, evaluate.

        Raises UserError where nothing was learned because loss or gradient norm are not finite.
        """
        if not report.metrics[catalog.OPTIMIZER_STEPS]:
            raise UserError(
                f"step {step}: loss or gradient norm is not finite, the weights were left as they were. Usual causes: "
                "a learning rate that is too high, kl=k3 far from the reference, a component that returns huge values"
            )
        config, self.state.step = self.config, step
        if self.state.ranks is not None:
            self.state.ranks.flush()
        metrics = step_metrics(step, batch, report, sync) | {catalog.RESAMPLED: float(scored.resampled)}
        if skipped := left_out(self.samples):
            metrics |= {catalog.LEFT_OUT: float(sum(skipped.values()))}
            metrics |= {catalog.left_out(reason): float(count) for reason, count in skipped.items()}
        metrics |= self._learn_to_look(batch)
        self.recorder.step(step, metrics, batch.groups)
        self.progress.step(step, metrics)
        self.recorder.worked(step, [*self.progress.worked(), *self.system.worked()])
        last, every = step == config.algorithm.steps, config.run.checkpoint_every
        self._heed(step, metrics, batch.groups, last)
        if (steps := profiled(config)) and (step == steps[-1] or (self.stop.is_set() and step in steps)):
            self.progress.phase("writing the traces")
            await self.system.trace(self.recorder.run_dir.resolve() / run_directory.PROFILE)
        if self.stop.is_set() or (every and (last or step % every == 0)):
            self.progress.phase(f"writing the checkpoint of step {step}")
            await self.state.save(self.system, self.recorder.run_dir)
        if config.run.eval_every and step % config.run.eval_every == 0 and not last and not self.stop.is_set():
            await self.assess(f"evaluating after step {step}")

    async def assess(self, phase: str) -> dict[str, float]:
        """Evaluate the current policy on the held-out samples, and record it; with `run.eval_every`, keep the best."""
        self.progress.phase(phase)
        metrics, groups = await evaluate_all(self.system, self.held_out, self.config.run.rollouts_kept)
        if self.config.run.eval_every and self.state.step and self.recorder.is_best(metrics):
            with replacing(self.recorder.run_dir.resolve() / run_directory.BEST) as folder:
                await self.system.export(folder)
        self.recorder.evaluation(self.state.step, metrics, groups)
        return metrics

    async def run(self, train: Callable[[Session], Awaitable[None]]) -> None:
        """Workers up, evaluation before and after, summary and exported policy, workers down."""
        own = asyncio.current_task()
        assert own is not None, "a coroutine runs in a task"
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._signalled, own)
        self.progress.phase("starting engine, SAM2 worker and learner")
        try:
            self.progress.say(await self.system.start())
            if self.state.checkpoint is not None:
                self.progress.phase(f"reading {self.state.checkpoint}")
                await self.state.restore(self.system)
            if self.system.must_calibrate and not self.state.step:
                self.progress.phase("learning when to look again")
                self.progress.say(await calibrate(self.system, self.samples))
            if self.state.before is None:
                self.state.before = await self.assess("evaluating the starting policy")
            await train(self)
            if not self.stop.is_set():
                after = await self.assess("evaluating the trained policy")
                summary = self.state.summary(after, self.system.restarts) | {"left_out": left_out(self.samples)}
                self.recorder.summary(summary)  # first: whatever becomes of the export, it says how the run went
                policy = self.recorder.run_dir.resolve() / run_directory.POLICY
                self.progress.phase("exporting the policy")
                with replacing(policy) as folder:
                    await self.system.export(folder)
                    write_card(folder, self.config, summary)
                self.recorder.exported(policy)
        finally:
            if not self.ended:
                self.progress.phase("shutting down")
                await self.system.shutdown()
                self.recorder.worked(self.state.step, [*self.progress.worked(), *self.system.worked()])

    def _signalled(self, own: asyncio.Task[Any] | None) -> None:
        """The first signal waits for the step that is under way; a second one, or one between steps, ends the run."""
        if self.stop.is_set() or not self.stepping:
            self.ended = own is not None and own.cancel()
            return
        self.stop.set()
        waits = f"step {self.state.step + 1} is finished and a checkpoint written"
        self.progress.say(f"stopping: {waits} first; another Ctrl-C or SIGTERM ends the run now")

    def _heed(self, step: int, metrics: Mapping[str, float], groups: Sequence[Group], last: bool) -> None:
        """Raise the alarms that are due, and stop where a rule of the user's says so."""
        for rule in self.rules:
            if rule.begins(metrics):
                what = ALARMS.get(rule.text, "run.stop_if")
                line = f"step {step}: {what} ({rule.text}); {example(groups)}"
                self.progress.say(f"alarm: {line}")
                self.recorder.alert(what, line)
                if rule.text in self.config.run.stop_if and not last:
                    self.met = rule
                    self.stop.set()

    def _learn_to_look(self, batch: Batch) -> dict[str, float]:
        """The step's looks in figures, measured by what was known before, and then learned from."""
        if self.config.look.mode != "relook":
            return {}
        calibrator = self.system.calibrator
        metrics = look_metrics(batch.groups) | {catalog.THRESHOLD: calibrator.state.threshold}
        calibrator.learn(one for group in batch.groups for one in group.trajectories)
        return metrics
