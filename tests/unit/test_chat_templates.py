"""Guards prompts and rewarded text against the chat templates that released models come with: without a system role,
with strings for content, beside the tokenizer, that lose the image, that open the thinking themselves."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.run.prompts import PromptMaker, read_policy_spec
from perception.config import ModelConfig, TaskConfig
from reward_workers.components.format import think_format
from rollout.engine import answer_text
from synthetic.policies import CHAT_TEMPLATE
from tests import builders, tiny_families

FORM = TaskConfig(system="Be brief.", template="Find {question}.", inline="", again="Again.")
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TURN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PARTS = (
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    + IMAGE
    + "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
USER = f"<|im_start|>user\n{IMAGE}Find the cat.<|im_end|>\n<|im_start|>assistant\n"
FOLDED = f"<|im_start|>user\n{IMAGE}Be brief.\n\nFind the cat.<|im_end|>\n<|im_start|>assistant\n"
AGAIN = f"\n<|im_start|>user\n{IMAGE}Again.<|im_end|>\n<|im_start|>assistant\n"

TEMPLATES = {
    "as released": (CHAT_TEMPLATE, SYSTEM + USER),
    "no system role, raises": (NO_SYSTEM + TURN + PARTS + END, FOLDED),
    "no system role, drops it": (
        "{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n" + PARTS + END,
        FOLDED,
    ),
    "strings, raises on parts": (TURN + "{{ '' + m['content'] }}" + END, SYSTEM + USER),
    "strings, trims": (TURN + "{{ m['content'].strip() }}" + END, SYSTEM + USER),
    "strings, writes parts as they are": (TURN + "{{ m['content'] }}" + END, SYSTEM + USER),
    "strings, no system role": (NO_SYSTEM + TURN + "{{ '' + m['content'] }}" + END, FOLDED),
    "parts of a turn, texts by another key, strings for answers": (  # as Pixtral's first one
        TURN
        + "{% if m['role'] == 'assistant' %}{{ m['content'] + '' }}{% elif m['content'] is string %}{{ m['content'] }}"
        + "{% else %}"
        + PARTS.replace("c['text']", "c['content']")
        + "{% endif %}"
        + END,
        SYSTEM + USER,
    ),
    "parts of a turn, strings for answers": (
        TURN
        + "{% if m['role'] == 'assistant' %}{{ m['content'] + '' }}{% elif m['content'] is string %}{{ m['content'] }}"
        + "{% else %}"
        + PARTS
        + "{% endif %}"
        + END,
        SYSTEM + USER,
    ),
    "loses the image": (
        TURN + "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}" + END,
        SYSTEM + USER,
    ),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_families.build("qwen2_5_vl", tmp_path_factory.mktemp("source")).path)


def policy(source: Path, folder: Path, template: str) -> ModelConfig:
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(template)
    return ModelConfig(path=str(folder), segmenter="")


def asked(maker: PromptMaker, task: str = "segment") -> str:
    return str(maker.tokenizer.decode(maker.tokens(builders.sample(question="the cat", task=task))))


@pytest.mark.parametrize(("template", "expected"), TEMPLATES.values(), ids=TEMPLATES)
def test_every_kind_of_template_shows_image_words_and_question(
    source: Path, template: str, expected: str, tmp_path: Path
) -> None:
    model = policy(source, tmp_path, template)
    maker = PromptMaker(model, {"segment": FORM, "silent": replace(FORM, system=None, form="segment")})
    assert asked(maker) == expected
    assert asked(maker, "silent") == USER, "null sends no system turn"
    assert maker.tokenizer.decode(maker.again("segment")) == maker.tokenizer.decode(maker.again("silent")) == AGAIN
    assert maker.ends == (maker.tokenizer.eos_token_id,) and read_policy_spec(model).opened == ""


@pytest.mark.parametrize(
    ("shown", "images"), [("<|video_pad|>", 0), (IMAGE + IMAGE, 2), ("{{ raise_exception('no images') }}", None)]
)
def test_a_template_that_shows_the_image_otherwise_is_refused(
    source: Path, shown: str, images: int | None, tmp_path: Path
) -> None:
    """As Gemma 3's, whose placeholder is another token than its image token: no second one is put beside it."""
    model = policy(source, tmp_path, TURN + PARTS.replace(IMAGE, shown) + "{{ 1 }}" + END)
    if images is None:  # what is left is a text with the image in it
        assert "Find the cat" in asked(PromptMaker(model, {"segment": FORM}))
    else:
        with pytest.raises(ValueError, match=f"shows {images} images for one"):
            PromptMaker(model, {"segment": FORM})


def test_a_llava_template_of_strings_shows_the_image_as_llava_does(tmp_path: Path) -> None:
    spec = tiny_families.build("llava_onevision", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] + ' ' }}{% endfor %}ASSISTANT:"
    )
    maker = PromptMaker(ModelConfig(path=spec.path, segmenter=""), {"segment": FORM})
    assert asked(maker) == "<s> SYSTEM: Be brief. USER: <image>\nFind the cat. ASSISTANT:"


def as_json(folder: Path) -> None:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))


def as_tokenizer(folder: Path, template: Any = CHAT_TEMPLATE) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))


def as_named(folder: Path) -> None:
    as_tokenizer(folder, [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "tool_use", "template": "none"}])


@pytest.mark.parametrize("put", [as_json, as_tokenizer, as_named])
def test_a_template_lies_in_any_of_the_places_it_is_released_in(source: Path, put: Any, tmp_path: Path) -> None:
    model = policy(source, tmp_path, "")
    (tmp_path / "chat_template.jinja").unlink()
    put(tmp_path)
    assert asked(PromptMaker(model, {"segment": FORM})) == SYSTEM + USER


@pytest.mark.parametrize(
    ("opens", "sampled"),
    [
        ("<think>\n", "It is left.</think><answer>[]</answer>"),
        ("<think>", "</think> <answer>[]</answer>"),
        ("<think>\n\n</think>\n\n", "<answer>[]</answer>"),
        ("", "<think>Left.</think><answer>[]</answer>"),
    ],
)
def test_what_the_template_opens_is_part_of_the_rewarded_text(
    source: Path, opens: str, sampled: str, tmp_path: Path
) -> None:
    template = CHAT_TEMPLATE.replace("assistant\n{% endif %}", f"assistant\n{opens}{{% endif %}}")
    model = policy(source, tmp_path, template)
    maker, spec = PromptMaker(model, {"segment": FORM}), read_policy_spec(model)
    assert asked(maker) == SYSTEM + USER + opens and spec.opened == opens
    ids = [*maker.tokenizer.encode(sampled), *spec.eos_token_ids]
    text = answer_text(spec, maker.tokenizer, ids)
    assert text == opens + sampled
    assert think_format(builders.case(text)) == 1.0


def test_tags_that_are_special_tokens_are_read(source: Path, tmp_path: Path) -> None:
    """Only the end of the turn and padding are no part of what is parsed."""
    model, words = policy(source, tmp_path, CHAT_TEMPLATE), ["<think>", "</think>", "<answer>", "</answer>"]
    tags = [*words, "<|box_start|>", "<|box_end|>"]
    tokenizer = PromptMaker(model, {}).tokenizer
    tokenizer.add_special_tokens({"extra_special_tokens": tags})
    tokenizer.save_pretrained(tmp_path)
    maker, spec = PromptMaker(model, {}), read_policy_spec(model)
    text = "<think>Left.</think><answer><|box_start|>[]<|box_end|></answer>"
    ids = maker.tokenizer.encode(text)
    assert set(maker.tokenizer.convert_tokens_to_ids(tags)) <= set(ids), "one token each"
    padded = [*ids, *spec.eos_token_ids, maker.tokenizer.pad_token_id]
    assert answer_text(spec, maker.tokenizer, padded) == text
    assert think_format(builders.case(answer_text(spec, maker.tokenizer, padded))) == 1.0
