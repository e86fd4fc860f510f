"""From a sample to the tokens a policy sees: template, chat format, answer frame."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerFast

from perception.config import ModelConfig, TaskConfig
from perception.frames import smart_resize
from perception.tasks import TASKS
from perception.types import ImageHandle, PolicySpec, Prompt, Sample

_ANSWER = "an answer that stands nowhere else"
PLACEHOLDERS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def read_policy_spec(model: ModelConfig) -> PolicySpec:
    """What engine and learner must agree on, from the policy's own files."""
    config = json.loads((Path(model.path) / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    return PolicySpec(
        path=str(Path(model.path).resolve()),
        dtype=model.dtype,
        image_token_id=config["image_token_id"],
        eos_token_ids=(tokenizer.eos_token_id,),
        banned_token_ids=tuple(sorted({config[key] for key in PLACEHOLDERS if key in config})),
    )


class PromptMaker:
    """Builds unexpanded prompts: one image placeholder per image, nothing re-tokenised later."""

    def __init__(self, model: ModelConfig, tasks: Mapping[str, TaskConfig]) -> None:
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(model.path)
        self._tasks = tasks
        self._again: dict[str, tuple[int, ...]] = {}
        self._frame = model.answer_frame
        images = AutoImageProcessor.from_pretrained(model.path)
        self._factor = images.patch_size * images.merge_size
        self._min_pixels, self._max_pixels = images.size["shortest_edge"], images.size["longest_edge"]

    def form(self, task: str) -> str:
        """The registered task behind a data set's `task`."""
        return self._tasks[task].form or task

    def tokens(self, sample: Sample, inline: bool = False) -> tuple[int, ...]:
        """Chat-formatted ids of one image and one question; raises KeyError for a task without a template."""
        template, question = self._tasks[sample.task], TASKS[self.form(sample.task)].question(sample)
        asked = (template.inline if inline else template.template).replace("{question}", question)
        return self._encode(self._chat([{"role": "system", "content": template.system}, _user(asked)]))

    def again(self, task: str) -> tuple[int, ...]:
        """What is fed after an answer's end-of-turn id to show a second image and ask again."""
        if task not in self._again:
            self._again[task] = self._encode(self._next_turn(task))
        return self._again[task]

    def _next_turn(self, task: str) -> str:
        template = self._tasks[task]
        before = [{"role": "system", "content": template.system}, _user("")]
        text = self._chat([*before, {"role": "assistant", "content": _ANSWER}, _user(template.again)])
        return text.partition(_ANSWER)[2].removeprefix(self.tokenizer.eos_token)

    def _chat(self, messages: list[dict[str, Any]]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def answer_frame(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the frame the policy answers in for an image of this size."""
        return (1000, 1000) if self._frame == "thousand" else self._resized(height, width)

    def image_tokens(self, height: int, width: int) -> int:
        """Tokens the policy's image processor makes of an image of this size (pixels)."""
        tall, wide = self._resized(height, width)
        return tall * wide // self._factor**2

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        return smart_resize(height, width, self._factor, self._min_pixels, self._max_pixels)

    def prompt(self, sample: Sample, image: ImageHandle, seed: int, inline: bool = False) -> Prompt:
        height, width = self.answer_frame(sample.height, sample.width)
        return Prompt(
            sample=sample,
            task=self.form(sample.task),
            token_ids=self.tokens(sample, inline),
            images=(image,),
            answer_height=height,
            answer_width=width,
            seed=seed,
        )


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}


def prompt_seed(run_seed: int, step: int, position: int) -> int:
    """A 31-bit seed for one group's sampling, different for every (run, step, position)."""
    return int(np.random.SeedSequence([run_seed, step, position]).generate_state(1)[0] >> 1)
