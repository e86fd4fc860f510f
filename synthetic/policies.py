"""Random-weight policies of Qwen2.5-VL's architecture, with a tokenizer and a processor of their own.

`mini` is small enough for two CPU cores; it differs from the released models by configuration only: few and narrow
layers, and RoPE theta 10 (on a 4x4 grid the default leaves the width axis almost no signal). `3b` and `7b` have the
released models' shapes, for real-size steps where no weights can be had. Digits and the answer's scaffold are single
tokens.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from launch.run.config import CONF

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SCAFFOLD = (
    "<think>",
    "</think>",
    "<look>",
    "</look>",
    "<answer>",
    "</answer>",
    '[{"bbox_2d": [',
    '], "point_2d": [',
    ']}, {"bbox_2d": [',
    "]}]",
    "[]",
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATCH = 14
VOCABULARY = 512


def make_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the corpus; every digit and every piece of the answer scaffold is one token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?[A-Za-z]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(SPECIAL) - len(SCAFFOLD),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = chat_tokenizer(backend)
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in SCAFFOLD])
    return tokenizer


def chat_tokenizer(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer with the chat format: its special tokens are added after what `backend` has."""
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIAL if t not in ("<|im_end|>", "<|endoftext|>")],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Shape of a policy: `conf/shape/<name>.yaml`."""

    text: dict[str, Any]
    """Settings of `Qwen2_5_VLConfig.text_config`."""
    vision: dict[str, Any]
    dtype: str
    """A floating-point type of torch, as bfloat16."""
    max_side: int
    """Larger images are resized to about this side."""
    tied: bool
    """The vocabulary head is the embedding."""


SHAPES = {path.stem: Shape(**yaml.safe_load(path.read_text())) for path in sorted((CONF / "shape").glob("*.yaml"))}


def configuration(shape: Shape, ids: Mapping[str, int]) -> Qwen2_5_VLConfig:
    """Configuration of a model of this shape, with a tokenizer's `ids` of the special tokens."""
    ends = {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    return Qwen2_5_VLConfig(
        text_config=shape.text | ends | {"bos_token_id": ids["<|endoftext|>"], "tie_word_embeddings": shape.tied},
        vision_config=shape.vision | {"patch_size": PATCH, "window_size": 112},
        tie_word_embeddings=shape.tied,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def make_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A model of this shape with random weights."""
    config = configuration(shape, tokenizer.added_tokens_encoder)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=shape.dtype)
    text = config.text_config
    model.generation_config.update(eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id)
    return model


def save(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, path: Path, max_side: int
) -> None:
    """Write the policy as any released one is: transformers and vLLM load the directory."""
    model.save_pretrained(path)
    settings = {
        "patch_size": PATCH,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 56 * 56, "longest_edge": max_side**2},
    }
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**settings),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**settings),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(path)
