"""Prompts: from a sample to the tokens of the policy's input: template, chat format, answer frame."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoConfig

from perception.config import ModelConfig, TaskConfig
from perception.families import engine_renames, family_of
from perception.frames import PIXEL_LIMITS
from perception.grammar import clean
from perception.tasks import TASKS
from perception.types import ImageHandle, PolicySpec, Prompt, Sample, View
from perception.views import Rect
from runtime.processor import load_processor

_MARK = "a text that stands nowhere else"
_MARKS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def read_policy_spec(model: ModelConfig) -> PolicySpec:
    """What engine and learner must agree on, from the policy's own files."""
    chat = PromptMaker(model, {})
    return PolicySpec(
        path=str(Path(model.path).resolve()),
        dtype=model.dtype,
        image_token_id=chat.image_token_id,
        eos_token_ids=chat.ends,
        banned_token_ids=chat.marks,
        pixels=chat.limits if model.min_pixels or model.max_pixels else None,
        opened=chat.opened,
        renames=engine_renames(chat.config.model_type, getattr(chat.config, "vision_config", chat.config).model_type),
    )


class PromptMaker:
    """Builds unexpanded prompts: one image placeholder per image, nothing re-tokenised later.

    Raises what transformers raises for a directory it cannot read, and ValueError where images have no placeholder, or
    the chat template none for them.
    """

    def __init__(self, model: ModelConfig, tasks: Mapping[str, TaskConfig]) -> None:
        self.config: Any = AutoConfig.from_pretrained(model.path)
        self.processor = load_processor(model.path, (model.min_pixels, model.max_pixels))
        if getattr(self.processor, "image_token", None) is None:
            raise ValueError(f"{type(self.processor).__name__} has no placeholder for images")
        self.tokenizer: Any = self.processor.tokenizer
        self.image_token_id: int = self.tokenizer.convert_tokens_to_ids(self.processor.image_token)
        self._special = {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        marks: set[Any] = {getattr(self.config, mark, None) for mark in _MARKS} | {*self.processor.image_token_ids}
        marks |= {*self.tokenizer.convert_tokens_to_ids(self.processor.all_special_multimodal_tokens)}
        self.marks: tuple[int, ...] = tuple(sorted(marks - {None}))
        """Ids that stand for images, which no answer holds."""
        template = self.processor.chat_template or self.tokenizer.chat_template
        self._template = template["default"] if isinstance(template, dict) else template
        self._learn_format()
        dialogue = self._chat(self._turn("user", ""), self._turn("assistant", _MARK))
        self.end = dialogue.partition(_MARK)[2].strip()
        """What the chat format writes after an answer."""
        own = [token for token in self._encode(self.end)[:1] if token in self.tokenizer.added_tokens_decoder]
        ends = dict.fromkeys([self.tokenizer.eos_token_id, *own])
        self.ends: tuple[int, ...] = tuple(end for end in ends if end is not None)
        """Ids that end an answer: the tokenizer's, then what the chat format ends a turn with."""
        self._tasks = tasks
        self._again: dict[str, tuple[int, ...]] = {}
        family = family_of(self.config.model_type)
        self.native, self._frame = family.native, model.answer_frame or family.frame

    def form(self, task: str) -> str:
        """The registered task behind a data set's `task`."""
        return self._tasks[task].form or task

    def tokens(self, sample: Sample, inline: bool = False) -> tuple[int, ...]:
        """Chat-formatted ids of one image and one question; raises KeyError for a task without a template."""
        template, question = self._tasks[sample.task], TASKS[self.form(sample.task)].question(sample)
        words = template.inline if inline else template.template

        def chat(question: str) -> str:
            return self._chat(*self._question(template, words.replace("{question}", question)), ask=True)

        text, marked = chat(question), chat(_MARK)
        plain = len(marked.partition(_MARK)[0]), len(text) - len(marked.rpartition(_MARK)[2])
        # The tokenizer puts its first token before, unless the chat format has.
        return self._encode(text, not text.startswith(self.tokenizer.bos_token or text), plain)

    def again(self, task: str) -> tuple[int, ...]:
        """What is fed after an answer's end-of-turn id to show a second image and ask again."""
        if task not in self._again:
            template = self._tasks[task]
            before = [*self._question(template, ""), self._turn("assistant", _MARK)]
            text = self._chat(*before, self._turn("user", template.again, image=True), ask=True)
            ids = self._encode(text.partition(_MARK)[2])
            self._again[task] = ids[1:] if ids[0] in self.ends else ids
        return self._again[task]

    def _chat(self, *messages: dict[str, Any], ask: bool = False) -> str:
        """With `ask`, up to where an answer begins."""
        form = {"chat_template": self._template, "tokenize": False}
        return clean(str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=ask, **form)))

    def _learn_format(self) -> None:
        """What the chat template takes: an image as a part of a turn or in its text, which may have to be no list of
        parts but a string; a system turn or none. And what it opens of an answer itself."""
        image, marks = self.processor.image_token, (getattr(self.config, mark, None) for mark in _MARKS[2:])
        around = [self.tokenizer.convert_ids_to_tokens(mark) for mark in marks if mark is not None]
        for self._content in _contents(image.join(around) if all(around) and around else image + "\n"):
            asked, bare = (self._try(self._turn("user", _MARK, image)) for image in (True, False))
            said = self._try(self._turn("user", "", image=True), self._turn("assistant", _MARK))
            # It shows image and text, takes an answer, and writes no list of parts as such.
            if said and asked != bare and _MARK in asked and "'type'" not in asked:
                break
        if (images := self._encode(asked).count(self.image_token_id)) != 1 or asked.count(_MARK) != 1:
            self._chat(self._turn("user", _MARK, image=True), ask=True)  # raises where the template itself is broken
            raise ValueError(f"the chat template shows {images} images for one; correct it")
        self._system = _MARK in self._try(self._turn("system", _MARK), self._turn("user", "", image=True))
        self.opened = "".join(asked.rpartition(_MARK)[2].partition("<think>")[1:])
        """What the chat format itself writes of an answer: "<think>" and what follows it."""

    def _try(self, *messages: dict[str, Any]) -> str:
        """The dialogue up to the answer; nothing where the chat template does not take it."""
        try:
            return self._chat(*messages, ask=True)
        except (TemplateError, TypeError, AttributeError):
            return ""

    def _question(self, template: TaskConfig, asked: str) -> list[dict[str, Any]]:
        """System turn, if there is one, and the user's, which it opens where the chat format has no place for it."""
        if template.system is None or self._system:
            system = [] if template.system is None else [self._turn("system", template.system)]
            return [*system, self._turn("user", asked, image=True)]
        return [self._turn("user", f"{template.system}\n\n{asked}", image=True)]

    def _turn(self, role: str, text: str, image: bool = False) -> dict[str, Any]:
        return {"role": role, "content": self._content(text, image)}

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
        if self.native:
            tall, wide, factor = self._resized(height, width)
            return tall * wide // factor**2
        return len(self.shown(Image.new("RGB", (width, height)))["input_ids"][0])

    def shown(self, image: Image.Image) -> Any:
        """What the policy's processor makes of one placeholder and an image; its tokens are `input_ids` (1, T)."""
        asked = {"text": [self.processor.image_token], "images": [image], "add_special_tokens": False}
        return self.processor(**asked, return_tensors="pt")

    def _resized(self, height: int, width: int) -> tuple[int, int, int]:
        """(height, width, side of one token's square), as the processor resizes. Raises ValueError."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize  # imports torchvision: seconds

        images = self.processor.image_processor
        factor = images.patch_size * images.merge_size
        return *smart_resize(height, width, factor, *self.limits), factor

    @property
    def limits(self) -> tuple[int, int]:
        """Fewest and most pixels of a resized image, in a family with such limits."""
        fewest, most = (self.processor.image_processor.size[name] for name in PIXEL_LIMITS)
        return fewest, most

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


def _contents(shown: str) -> tuple[Callable[[str, bool], Any], ...]:
    """Ways to write a turn's text and image. `shown`: an image in a text."""
    return (
        lambda text, image: [{"type": "image"}] * image + [{"type": "text", "text": text}],
        lambda text, image: [{"type": "text", "text": shown * image + text}],
        lambda text, image: shown * image + text,
    )


def prompt_seed(run_seed: int, step: int, position: int) -> int:
    """A 31-bit seed for one group's sampling, different for every (run, step, position)."""
    return int(np.random.SeedSequence([run_seed, step, position]).generate_state(1)[0] >> 1)
