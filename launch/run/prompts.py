"""Prompts: from a sample to the tokens of the policy's input: template, chat format, answer frame."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from perception.config import ModelConfig, TaskConfig
from perception.families import engine_renames, family_of
from perception.frames import smart_resize
from perception.grammar import clean
from perception.tasks import TASKS
from perception.types import ImageHandle, PolicySpec, Prompt, Sample, View
from perception.views import Rect

_ANSWER = "an answer that stands nowhere else"
_MARKS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def read_policy_spec(model: ModelConfig) -> PolicySpec:
    """What engine and learner must agree on, from the policy's own files."""
    chat = PromptMaker(model, {})
    marks: set[Any] = {getattr(chat.config, mark, None) for mark in _MARKS} | {*chat.processor.image_token_ids}
    marks |= {*chat.tokenizer.convert_tokens_to_ids(chat.processor.all_special_multimodal_tokens)}
    return PolicySpec(
        path=str(Path(model.path).resolve()),
        dtype=model.dtype,
        image_token_id=chat.image_token_id,
        eos_token_ids=chat.ends,
        banned_token_ids=tuple(sorted(marks - {None})),
        renames=engine_renames(chat.config.model_type, getattr(chat.config, "vision_config", chat.config).model_type),
    )


class PromptMaker:
    """Builds unexpanded prompts: one image placeholder per image, nothing re-tokenised later.

    Raises what transformers raises for a directory it cannot read, and ValueError where images have no placeholder.
    """

    def __init__(self, model: ModelConfig, tasks: Mapping[str, TaskConfig]) -> None:
        self.config: Any = AutoConfig.from_pretrained(model.path)
        self.processor: Any = AutoProcessor.from_pretrained(model.path, backend="torchvision")
        if getattr(self.processor, "image_token", None) is None:
            raise ValueError(f"{type(self.processor).__name__} has no placeholder for images")
        self.tokenizer: Any = self.processor.tokenizer
        self.image_token_id: int = self.tokenizer.convert_tokens_to_ids(self.processor.image_token)
        self._special = {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        ended = self._encode(self._chat(_turn("user", ""), _turn("assistant", _ANSWER)).partition(_ANSWER)[2])[:1]
        own = [token for token in ended if token in self.tokenizer.added_tokens_decoder]
        self.ends: tuple[int, ...] = tuple(dict.fromkeys([self.tokenizer.eos_token_id, *own]))
        """Ids that end an answer: the tokenizer's, then what the chat format ends a turn with."""
        self._tasks = tasks
        self._again: dict[str, tuple[int, ...]] = {}
        family = family_of(self.config.model_type)
        self._native, self._frame = family.native, model.answer_frame or family.frame

    def form(self, task: str) -> str:
        """The registered task behind a data set's `task`."""
        return self._tasks[task].form or task

    def tokens(self, sample: Sample, inline: bool = False) -> tuple[int, ...]:
        """Chat-formatted ids of one image and one question; raises KeyError for a task without a template."""
        template, question = self._tasks[sample.task], TASKS[self.form(sample.task)].question(sample)
        words = template.inline if inline else template.template

        def chat(question: str) -> str:
            asked = words.replace("{question}", question)
            return self._chat(_turn("system", template.system), _turn("user", asked, image=True), ask=True)

        text, marked = chat(question), chat(_ANSWER)
        plain = len(marked.partition(_ANSWER)[0]), len(text) - len(marked.rpartition(_ANSWER)[2])
        # The tokenizer puts its first token before, unless the chat format has.
        return self._encode(text, not text.startswith(self.tokenizer.bos_token or text), plain)

    def again(self, task: str) -> tuple[int, ...]:
        """What is fed after an answer's end-of-turn id to show a second image and ask again."""
        if task not in self._again:
            template = self._tasks[task]
            before = [_turn("system", template.system), _turn("user", "", image=True), _turn("assistant", _ANSWER)]
            text = self._chat(*before, _turn("user", template.again, image=True), ask=True)
            ids = self._encode(text.partition(_ANSWER)[2])
            self._again[task] = ids[1:] if ids[0] in self.ends else ids
        return self._again[task]

    def _chat(self, *messages: dict[str, Any], ask: bool = False) -> str:
        """With `ask`, up to where an answer begins."""
        form = {"chat_template": self.processor.chat_template or self.tokenizer.chat_template, "tokenize": False}
        return clean(str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=ask, **form)))

    def spelled(self, text: str) -> list[int]:
        """Ids of plain text: a special token in it is written out like any other word."""
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def _encode(self, text: str, special: bool = False, plain: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
        """`plain`: the first character, and the one after the last, of a part in which special tokens are spelled."""
        made = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ids: list[int] = []
        for token, (start, end) in zip(made["input_ids"], made["offset_mapping"], strict=True):
            spells = token in self._special and start < plain[1] and end > plain[0]
            ids += self.spelled(text[start:end]) if spells else [token]
        return tuple(ids)

    def answer_frame(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the frame the policy answers in for an image of this size."""
        return (1000, 1000) if self._frame == "thousand" else self._resized(height, width)[:2]

    def view(self, rect: Rect, height: int, width: int) -> View:
        """The part `rect` of an image (original pixels), shown at this size, in the frame the policy answers in."""
        left, top, right, bottom = rect
        tall, wide = self.answer_frame(height, width)
        return View(left=left, top=top, right=right, bottom=bottom, height=tall, width=wide)

    def image_tokens(self, height: int, width: int) -> int:
        """Tokens the policy's image processor makes of an image of this size (pixels)."""
        if self._native:
            tall, wide, factor = self._resized(height, width)
            return tall * wide // factor**2
        shown = {"text": [self.processor.image_token], "images": [Image.new("RGB", (width, height))]}
        return len(self.processor(**shown, add_special_tokens=False)["input_ids"][0])

    def longest_image(self, sizes: Collection[tuple[int, int]]) -> int:
        """Most tokens of any of these; where only the processor can tell, of 64 from the widest to the tallest."""
        tried = sorted(sizes, key=lambda size: size[0] / size[1])
        if not self._native:
            tried = [max(sizes, key=math.prod), tried[-1], *tried[:: -(-len(tried) // 64)]]
        return max(self.image_tokens(*size) for size in tried)

    def _resized(self, height: int, width: int) -> tuple[int, int, int]:
        """(height, width, side of one token's square)."""
        images = self.processor.image_processor
        factor, limits = images.patch_size * images.merge_size, images.size
        return *smart_resize(height, width, factor, limits["shortest_edge"], limits["longest_edge"]), factor

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


def _turn(role: str, text: str, image: bool = False) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "image"}] * image + [{"type": "text", "text": text}]}


def prompt_seed(run_seed: int, step: int, position: int) -> int:
    """A 31-bit seed for one group's sampling, different for every (run, step, position)."""
    return int(np.random.SeedSequence([run_seed, step, position]).generate_state(1)[0] >> 1)
