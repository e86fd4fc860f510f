"""GRPO for models that see: sample groups, score them, rank the rewards, take a step, send the weights back.

python -m launch.train recipe=quickstart learner.lr=2e-5
python -m launch.train --multirun recipe=quickstart learner.lr=2e-5,5e-5
python -m launch.train run.resume=quickstart
ray job submit --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "900"}}' --working-dir . -- \\
    python -m launch.train recipe=quickstart run.output=/shared/runs
"""

import asyncio

from launch.record.progress import Progress
from launch.record.recorder import Recorder
from launch.record.run_directory import check_inputs
from launch.record.summary import show
from launch.run.checks import check_files, check_machine, toy_settings
from launch.run.config import changes, entry
from launch.run.models import located
from launch.run.session import Session
from launch.run.state import RunState
from launch.run.system import System
from perception.config import Config
from perception.errors import StoppedError, UserError
from report import write_report
from runtime import cluster
from synthetic.prepare import prepare


async def train(run: Session) -> None:
    """The algorithm."""
    async with run.pipeline() as scored:  # cursor -> prompts -> rollouts, looked at again -> scores
        for step in run.steps():
            batch = await run.next_batch(scored, step)  # ranks, rewards, advantages
            report = await run.system.learner.update(batch.teaching)
            sync = await run.system.sync_weights(version=step)
            await run.finish(step, batch, report, sync, scored)  # calibrate, record, checkpoint, evaluate


def run(config: Config) -> None:
    for line in changes(config):
        print(line)
    if not config.data.train:
        raise UserError("no value for data.train: give data.train=... (command line or recipe)")
    with Progress(config.algorithm.steps) as progress:
        config = located(config)
        check_inputs(config)
        check_machine(config, say=print)
        prepare(config, say=progress.phase)
        samples, held_out = check_files(config, progress.phase)
        for warning in toy_settings(config):
            print(f"warning: {warning}")
        state = RunState.start(config, samples)
        progress.phase("starting Ray")
        cluster.connect(config.placement, config.plugins)
        with Recorder(config, resume_step=state.step if config.run.resume else None) as recorder:
            session = Session(config, samples, held_out, state, System(config, recorder.run_dir), recorder, progress)
            asyncio.run(session.run(train))
    report = write_report(recorder.run_dir)
    show(recorder.run_dir)
    progress.say(f"report   {report.resolve()}")
    if session.met is not None:
        raise StoppedError(f"run.stop_if: {session.met.text}")


if __name__ == "__main__":
    entry(run)
