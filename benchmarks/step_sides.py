"""What each side of `benchmarks.step` does in its own process: the program itself, or TRL's GRPOTrainer.

Both take the run's samples in the run's order, prompts of the same tokens, its reward (SAM2 included; in TRL's case in
the trainer's own process) and an answer's limits, and both are timed from the end of a step to the end of the next. Of
TRL only clocks are added: it samples by transformers' generate, with no reference model and no gradient checkpointing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from PIL import Image

from benchmarks import trl_step
from benchmarks.turns import wait
from launch import train
from launch.run.config import compose
from launch.run.cursor import Cursor
from launch.run.models import located
from launch.run.prompts import PromptMaker, prompt_seed, read_policy_spec
from launch.run.samples import load_samples
from launch.run.session import Session
from launch.run.step_metrics import step_metrics
from perception import images
from perception import metric_catalog as catalog
from perception.config import Config
from perception.tasks import TASKS
from perception.types import Prompt, Sample
from reward_workers.combine import rewarded
from reward_workers.worker import RewardWorker
from rollout.engine import answer_text
from runtime.objects import fetch, handle
from tests import builders

PARTS = tuple(name.partition("/")[2] for name in catalog.STAGES[:-1])
"""Parts of a step that both sides have: generate, score, learn, sync. What remains is the controller's, or in TRL's
case what loads, decodes and prepares the data."""


def serve_program(link: Connection, words: list[str]) -> None:
    """`launch.train` on these words."""

    class Turns(Session):
        def steps(self) -> Iterator[int]:
            for step in super().steps():
                wait(link)
                self.began = time.perf_counter()
                yield step

        async def finish(self, step: int, batch: Any, report: Any, sync: Any, scored: Any) -> None:
            await super().finish(step, batch, report, sync, scored)
            seconds = time.perf_counter() - self.began
            metrics = step_metrics(step, batch, report, sync)
            tokens = sum(one.sampled_tokens for group in batch.groups for one in group.trajectories)
            parts = {part: metrics[name] for part, name in zip(PARTS, catalog.STAGES, strict=False)}
            link.send({"step": seconds, **parts, "tokens": tokens})

    train.Session = Turns  # type: ignore[misc]
    train.run(compose(words))


def serve_trl(link: Connection, words: list[str], rows: int) -> None:
    """TRL, `rows` rows per forward pass. Raises RuntimeError where its prompts are not the program's."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    config = located(compose(words))
    steps, n, a_step = config.algorithm.steps, config.algorithm.group_size, config.algorithm.prompts_per_step
    drawn = Cursor(load_samples(config)[0], config.run.seed).next(steps * a_step)
    scorer = Scorer(config, drawn)
    clock = dict.fromkeys((*PARTS, "tokens"), 0.0)

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        clock[part] += time.perf_counter() - began

    class Timed(GRPOTrainer):  # type: ignore[misc]
        def _generate_single_turn(self, prompt_ids: list[list[int]], *rest: Any, **named: Any) -> Any:
            with timed("generate"):
                answers, logprobs = super()._generate_single_turn(prompt_ids, *rest, **named)
            scorer.check(prompt_ids, self.state.global_step * a_step)
            clock["tokens"] = sum(map(len, answers))
            return answers, logprobs

        def _calculate_rewards(self, *arguments: Any) -> Any:
            with timed("score"):
                return super()._calculate_rewards(*arguments)

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            batch = super()._generate_and_score_completions(inputs)
            clock["learn"] -= time.perf_counter()
            return batch

    class Clock(TrainerCallback):  # type: ignore[misc]
        began = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            wait(link)
            self.began = time.perf_counter()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            ended = time.perf_counter()
            clock["learn"] += ended
            link.send({"step": ended - self.began, **clock})
            clock.update(dict.fromkeys(clock, 0.0))
            if state.global_step < steps:
                self.on_train_begin()

    with tempfile.TemporaryDirectory() as folder:
        settings = trl_step.settings(
            folder,
            scorer.policy,
            device="cpu",
            n=n,
            answers=a_step * n,
            rows=rows,
            longest=config.rollout.max_new_tokens,
            temperature=config.rollout.temperature,
            steps=steps,
            lr=config.learner.lr,
            checkpointing=False,
        )
        trainer = Timed(
            scorer.policy.path,
            reward_funcs=scorer.rewards,
            args=settings,
            train_dataset=Dataset.from_list([_row(config, one, at) for at, one in enumerate(drawn)]),
            callbacks=[Clock()],
        )
        trainer.train()


class Scorer:
    """The run's reward as a reward function of TRL's."""

    def __init__(self, config: Config, samples: list[Sample]) -> None:
        self.policy = read_policy_spec(config.model)
        self._config, self._maker = config, PromptMaker(config.model, config.task)
        self._worker = RewardWorker(config.reward, config.look, config.model, "cpu", threads=0)
        self._worker.start()
        seed = prompt_seed(config.run.seed, 0, 0)  # of no matter: nothing is sampled from these
        self._prompts: list[Prompt] = [self._maker.prompt(one, handle(one), seed) for one in samples]

    def rewards(self, completion_ids: list[list[int]], number: list[int], **_: Any) -> list[float | None]:
        n, groups = self._config.algorithm.group_size, []
        for first in range(0, len(number), n):
            texts = (answer_text(self.policy, self._maker.tokenizer, ids) for ids in completion_ids[first : first + n])
            group = builders.group(*map(builders.trajectory, texts), about=self._prompts[number[first]])
            groups.append(self._worker.score(group))
        return [one.reward for group in rewarded(groups, self._config.reward, None) for one in group.trajectories]

    def check(self, prompt_ids: list[list[int]], first: int) -> None:
        """TRL's prompts of a step, each `group_size` times and with the image's ids repeated."""
        image, n = self.policy.image_token_id, self._config.algorithm.group_size
        for at, ids in enumerate(prompt_ids[::n], first):
            once = tuple(token for place, token in enumerate(ids) if token != image or ids[place - 1] != image)
            if once != self._prompts[at].token_ids:
                raise RuntimeError(f"prompt {at} of TRL is {once}, ours {self._prompts[at].token_ids}")


def _row(config: Config, sample: Sample, number: int) -> dict[str, Any]:
    template = config.task[sample.task]
    asked = template.template.replace("{question}", TASKS[template.form or sample.task].question(sample))
    system = [] if template.system is None else [{"role": "system", "content": template.system}]
    image = Image.fromarray(images.pixels(handle(sample), fetch))
    return {"prompt": [*system, {"role": "user", "content": asked}], "image": image, "number": number}
