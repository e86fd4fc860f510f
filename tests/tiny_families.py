"""Tiny random policies of other families than `tiny_policy`'s, saved with tokenizer and processor.

Weights are drawn wider than the library draws them: answers must depend on what the image shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from perception.types import PolicySpec
from tests import tiny_policy

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def build(family: str, path: Path, seed: int = 0) -> PolicySpec:
    """family: qwen2_5_vl, qwen2_vl, qwen3_vl or llava."""
    if family == "qwen2_5_vl":
        return tiny_policy.build(path, seed)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_policy.byte_tokenizer()
    ids = dict(zip(tiny_policy.SPECIAL, tokenizer.convert_tokens_to_ids(list(tiny_policy.SPECIAL)), strict=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = {"qwen2_vl": _qwen2, "qwen3_vl": _qwen3, "llava": _llava}[family](tokenizer, ids)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1 if "embed" in name else parameter[0].numel() ** -0.5)
    model.save_pretrained(path)
    _processor(family, tokenizer).save_pretrained(path)
    pads = tuple(ids[t] for t in ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"))
    return PolicySpec(
        path=str(path),
        dtype="float32",
        image_token_id=ids["<|image_pad|>"],
        eos_token_ids=(ids["<|im_end|>"],),
        banned_token_ids=pads,
    )


def _special(ids: dict[str, int]) -> dict[str, int]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def _qwen2(tokenizer: PreTrainedTokenizerFast, ids: dict[str, int]) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = TEXT | {"vocab_size": len(tokenizer), "rope_parameters": rope}
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **_special(ids))
    )


def _qwen3(tokenizer: PreTrainedTokenizerFast, ids: dict[str, int]) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    text = TEXT | {"vocab_size": len(tokenizer), "rope_parameters": rope, "head_dim": 16}
    vision = {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 14,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **_special(ids))
    )


def _llava(tokenizer: PreTrainedTokenizerFast, ids: dict[str, int]) -> Any:
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        projection_dim=64,
    )
    text = LlamaConfig(vocab_size=len(tokenizer), **TEXT)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=ids["<|image_pad|>"],
            tie_word_embeddings=True,
        )
    )


def _processor(family: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    template = {"tokenizer": tokenizer, "chat_template": tiny_policy.CHAT_TEMPLATE}
    if family == "llava":
        square = {"height": 56, "width": 56}
        return LlavaProcessor(
            image_processor=CLIPImageProcessor(size=square, crop_size=square, do_center_crop=False),
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            image_token="<|image_pad|>",
            **template,
        )
    limits = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}
    images = Qwen2VLImageProcessor(size=limits, patch_size=14)
    if family == "qwen2_vl":
        return Qwen2VLProcessor(image_processor=images, video_processor=Qwen2VLVideoProcessor(size=limits), **template)
    return Qwen3VLProcessor(image_processor=images, video_processor=Qwen3VLVideoProcessor(size=limits), **template)
