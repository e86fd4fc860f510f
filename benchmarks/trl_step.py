"""TRL's GRPOTrainer on given completions: the rival of `benchmarks.learner`.

Stock trainer, stock sdpa attention, no reference model. Replaced is only what samples completions,
`_generate_single_turn`, which hands over the batch's own. The clock runs from there to the end of the optimizer step:
all that the trainer does with completions counts (decoding them, its image processor, rewards, advantages, loss), what
it did to prompts before sampling does not. `train_s` is the part after `_generate_and_score_completions`: forward,
backward, optimizer. Without vLLM and with one optimizer step per generation TRL takes no old log-probs; with vLLM it
would add one forward pass over all rows, which is not counted here.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from perception.types import Group, PolicySpec

REQUIREMENT = "trl==1.16.0"


def train(
    policy: PolicySpec,
    groups: Sequence[Group],
    *,
    device: str,
    steps: int,
    lr: float,
    rows: int,
    checkpointing: bool,
    wait: Callable[[], None],
    done: Callable[[dict[str, float]], None],
) -> None:
    """`steps` optimizer steps, each over all `groups`, `rows` rows per forward pass.

    `wait` is called where completions would be sampled; `done` gets `seconds`, `train_s` and `grad_norm` of a step.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    answers = [list(one.turns[0].token_ids) for group in groups for one in group.trajectories]
    advantages = [one.advantage for group in groups for one in group.trajectories]
    began = {"step": 0.0, "train": 0.0}

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    class GivenCompletions(GRPOTrainer):  # type: ignore[misc]
        def _generate_single_turn(self, *_: Any, **__: Any) -> tuple[list[list[int]], None]:
            wait()
            began["step"] = now()
            return answers, None

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            batch = super()._generate_and_score_completions(inputs)
            began["train"] = now()
            return batch

        def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
            self.grad_norm = float(super()._get_grad_norm(model, grad_norm))
            return self.grad_norm

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            end = now()
            done({"seconds": end - began["step"], "train_s": end - began["train"], "grad_norm": trainer.grad_norm})

    n = len(groups[0].trajectories)
    with tempfile.TemporaryDirectory() as folder:
        config = settings(
            folder,
            policy,
            device=device,
            n=n,
            answers=len(answers),
            rows=rows,
            longest=max(map(len, answers)),
            temperature=1.0,
            steps=steps,
            lr=lr,
            checkpointing=checkpointing,
        )
        trainer = GivenCompletions(
            policy.path,
            reward_funcs=lambda completions, **_: advantages,
            args=config,
            train_dataset=Dataset.from_list([_row(group) for group in groups]),
            callbacks=[Clock()],
        )
        trainer.train()


def settings(
    folder: str,
    policy: PolicySpec,
    *,
    device: str,
    n: int,
    answers: int,
    rows: int,
    longest: int,
    temperature: float,
    steps: int,
    lr: float,
    checkpointing: bool,
) -> Any:
    """TRL's settings of a trainer that takes an optimizer step over `answers` answers in groups of `n`, none longer
    than `longest` tokens, `rows` a forward pass."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder,
        use_cpu=device == "cpu",
        bf16=False,  # the weights are in the policy's dtype; autocast on top would only cost time
        model_init_kwargs={"dtype": policy.dtype, "attn_implementation": "sdpa"},
        num_generations=n,
        max_completion_length=longest,
        temperature=temperature,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=answers // rows,
        gradient_checkpointing=checkpointing,
        max_steps=steps,
        learning_rate=lr,
        lr_scheduler_type="constant",
        beta=0.0,
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _row(group: Group) -> dict[str, Any]:
    prompt = group.prompt
    image = Image.open(io.BytesIO(prompt.images[0].ref))
    return {"prompt": [{"role": "user", "content": prompt.sample.question}], "image": image}
