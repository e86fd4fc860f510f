"""Models and processors of `tiny_families`, by family: a random model for a tokenizer, and what shows it images.

Heads are of 32 numbers: vLLM's attention on the CPU knows none of 16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf
from transformers import PreTrainedTokenizerFast as Tokenizer

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
TEXT = SHAPE | {"num_hidden_layers": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096}
VISION = SHAPE | {"num_hidden_layers": 3}
PIXTRAL = VISION | {"image_size": 224, "patch_size": 14}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 7, 7]}
TILE = 56
SQUARE = {"height": TILE, "width": TILE}
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]
LIMITS = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}
NATIVE = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def _text(tokenizer: Tokenizer, **more: Any) -> dict[str, Any]:
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return TEXT | {"vocab_size": len(tokenizer), "tie_word_embeddings": True} | ends | more


def _native(tokenizer: Tokenizer) -> dict[str, Any]:
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in NATIVE.items()}
    return {"tie_word_embeddings": True, **ids}


def _qwen2(tokenizer: Tokenizer) -> Any:
    text = _text(tokenizer, rope_parameters=ROPE)
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    config = hf.Qwen2VLConfig(text_config=text, vision_config=vision, **_native(tokenizer))
    return hf.Qwen2VLForConditionalGeneration(config)


def _qwen3(tokenizer: Tokenizer) -> Any:
    text = _text(tokenizer, rope_parameters=ROPE | {"mrope_interleaved": True}, head_dim=32)
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "out_hidden_size": 64,
        "depth": 3,
        "num_heads": 2,
        "patch_size": 14,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    config = hf.Qwen3VLConfig(text_config=text, vision_config=vision, **_native(tokenizer))
    return hf.Qwen3VLForConditionalGeneration(config)


def _qwen3_5(tokenizer: Tokenizer) -> Any:
    """Three layers of linear attention and one of the other kind; vLLM's kernels on the CPU want these dimensions."""
    linear = {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "num_hidden_layers": 4}
    rope = ROPE | {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
    size = {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 64}
    vision = size | {"depth": 2, "num_heads": 2, "patch_size": 14, "num_position_embeddings": 64}
    text = _text(tokenizer, rope_parameters=rope, head_dim=32, **linear)
    config = hf.Qwen3_5Config(text_config=text, vision_config=vision, **_native(tokenizer))
    return hf.Qwen3_5ForConditionalGeneration(config)


def _with(text: Any, vision: Any, tokenizer: Tokenizer, image: str = "<image>") -> dict[str, Any]:
    named = {"image_token_id": tokenizer.convert_tokens_to_ids(image), "tie_word_embeddings": True}
    return {"text_config": text, "vision_config": vision, **named}


def _llava(tokenizer: Tokenizer) -> Any:
    vision = hf.CLIPVisionConfig(image_size=TILE, patch_size=14, projection_dim=64, **VISION)
    text = hf.LlamaConfig(**_text(tokenizer))
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(**_with(text, vision, tokenizer, "<|image_pad|>")))


def _onevision(tokenizer: Tokenizer) -> Any:
    """16 tokens a tile; an image is a tile that shows it whole and two or four of its parts."""
    vision = hf.SiglipVisionConfig(image_size=TILE, patch_size=14, vision_use_head=False, **VISION)
    return hf.LlavaOnevisionForConditionalGeneration(
        hf.LlavaOnevisionConfig(
            **_with(hf.Qwen2Config(**_text(tokenizer)), vision, tokenizer),
            video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
            image_grid_pinpoints=PINPOINTS,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )
    )


def _internvl(tokenizer: Tokenizer) -> Any:
    """4 tokens a tile between two marks; an image is up to four tiles, and a tile that shows it whole if it is more."""
    vision = hf.InternVLVisionConfig(image_size=[TILE, TILE], patch_size=[14, 14], **VISION)
    text = hf.Qwen2Config(**_text(tokenizer))
    return hf.InternVLForConditionalGeneration(hf.InternVLConfig(**_with(text, vision, tokenizer, "<IMG_CONTEXT>")))


def _idefics(family: str) -> Callable[[Tokenizer], Any]:
    """4 tokens a tile, each behind its marks; an image is 112 pixels long: up to four tiles, and one that shows it
    whole."""

    def build(tokenizer: Tokenizer) -> Any:
        vision = VISION | {"image_size": TILE, "patch_size": 14}
        text = hf.LlamaConfig(**_text(tokenizer, pad_token_id=tokenizer.pad_token_id))
        config = getattr(hf, f"{family}Config")(
            **_with(text, vision, tokenizer), scale_factor=2, pad_token_id=tokenizer.pad_token_id
        )
        return getattr(hf, f"{family}ForConditionalGeneration")(config)

    return build


def _mistral3(tokenizer: Tokenizer) -> Any:
    """A token for 28 x 28 pixels, with a mark behind every row of them."""
    text = hf.MistralConfig(**_text(tokenizer, head_dim=32, sliding_window=None))
    parts = _with(text, hf.PixtralVisionConfig(**PIXTRAL), tokenizer, "[IMG]")
    return hf.Mistral3ForConditionalGeneration(hf.Mistral3Config(**parts, spatial_merge_size=2))


def _pixtral(tokenizer: Tokenizer) -> Any:
    """A token for 14 x 14 pixels, with a mark behind every row of them."""
    text = hf.MistralConfig(**_text(tokenizer, head_dim=32, sliding_window=None))
    parts = _with(text, hf.PixtralVisionConfig(**PIXTRAL), tokenizer, "[IMG]")
    chosen = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(**parts, **chosen))


def _gemma3(tokenizer: Tokenizer) -> Any:
    """4 tokens an image between marks and empty lines. Every other layer sees 8 tokens back, and all of an image."""
    text = _text(tokenizer, head_dim=32, sliding_window=8, query_pre_attn_scalar=32)
    kinds = {"layer_types": ["sliding_attention", "full_attention"]}
    vision = hf.SiglipVisionConfig(image_size=TILE, patch_size=14, vision_use_head=False, **VISION)
    marks = {f"{mark}_token_index": tokenizer.convert_tokens_to_ids(MARK) for mark, MARK in GEMMA.items()}
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**text, **kinds),
        vision_config=vision,
        mm_tokens_per_image=4,
        tie_word_embeddings=True,
        **marks,
    )
    return hf.Gemma3ForConditionalGeneration(config)


GEMMA = {"boi": "<start_of_image>", "eoi": "<end_of_image>", "image": "<image_soft_token>"}
MODELS: dict[str, Callable[[Tokenizer], Any]] = {
    "qwen2_vl": _qwen2,
    "qwen3_vl": _qwen3,
    "qwen3_5": _qwen3_5,
    "llava": _llava,
    "llava_onevision": _onevision,
    "internvl": _internvl,
    "idefics3": _idefics("Idefics3"),
    "smolvlm": _idefics("SmolVLM"),
    "mistral3": _mistral3,
    "pixtral": _pixtral,
    "gemma3": _gemma3,
}


def processor(family: str, **chat: Any) -> Any:
    """`chat`: tokenizer and chat template."""
    kinds = {"size": LIMITS, "patch_size": 14}
    if family == "qwen2_vl":
        images, videos = hf.Qwen2VLImageProcessor(**kinds), hf.Qwen2VLVideoProcessor(size=LIMITS)
        return hf.Qwen2VLProcessor(image_processor=images, video_processor=videos, **chat)
    if family in ("qwen3_vl", "qwen3_5"):
        images, videos = hf.Qwen2VLImageProcessor(**kinds), hf.Qwen3VLVideoProcessor(size=LIMITS)
        return hf.Qwen3VLProcessor(image_processor=images, video_processor=videos, **chat)
    if family == "llava":
        images = hf.CLIPImageProcessor(size=SQUARE, crop_size=SQUARE, do_center_crop=False)
        shown = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1, "patch_size": 14}
        return hf.LlavaProcessor(image_processor=images, image_token="<|image_pad|>", **shown, **chat)
    if family == "llava_onevision":
        return hf.LlavaOnevisionProcessor(
            image_processor=hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS),
            video_processor=hf.LlavaOnevisionVideoProcessor(size=SQUARE),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            **chat,
        )
    if family == "internvl":
        images = hf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4)
        video = hf.InternVLVideoProcessor(size=SQUARE)
        return hf.InternVLProcessor(image_processor=images, video_processor=video, image_seq_length=4, **chat)
    if family in ("idefics3", "smolvlm"):
        sizes = {"size": {"longest_edge": 2 * TILE}, "max_image_size": {"longest_edge": TILE}}
        if family == "idefics3":
            return hf.Idefics3Processor(hf.Idefics3ImageProcessor(**sizes), image_seq_len=4, **chat)
        video = hf.SmolVLMVideoProcessor(**sizes)
        return hf.SmolVLMProcessor(hf.SmolVLMImageProcessor(**sizes), video_processor=video, image_seq_len=4, **chat)
    if family == "gemma3":
        return hf.Gemma3Processor(hf.Gemma3ImageProcessor(size=SQUARE), image_seq_length=4, **chat)
    images = hf.PixtralImageProcessor(size={"longest_edge": 4 * TILE}, patch_size={"height": 14, "width": 14})
    merged = 2 if family == "mistral3" else 1
    return hf.PixtralProcessor(images, patch_size=14, spatial_merge_size=merged, **chat)
