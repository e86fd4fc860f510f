"""Tiny random policies of other families than `tiny_policy`'s, saved with tokenizer and processor.

Weights are drawn wider than the library draws them: answers must depend on what the image shows. `qwen2_vl`, `qwen3_vl`
and `llava` have the byte tokenizer of `tiny_policy`; `llava_onevision` and `internvl` one of their own, Llama's in
kind, with another chat format and whole answers as tokens, so that what they sample is often a readable answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
)

from perception.types import PolicySpec
from synthetic.policies import CHAT_TEMPLATE, SPECIAL
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
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
TILE = 56
SQUARE = {"height": TILE, "width": TILE}
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]
IMAGE = {"llava_onevision": "<image>", "internvl": "<IMG_CONTEXT>"}
MARKS = {
    "llava_onevision": {"image_token": "<image>", "video_token": "<video>"},
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
}
ANSWERS = [
    f'<answer>[{{"bbox_2d": [{x}, {x}, {x + 300}, {x + 400}], "point_2d": [{x + 150}, {x + 200}]}}]</answer>'
    for x in range(0, 600, 20)
]


def build(family: str, path: Path, seed: int = 0) -> PolicySpec:
    """family: qwen2_5_vl, qwen2_vl, qwen3_vl, qwen3_5, llava, llava_onevision or internvl."""
    if family == "qwen2_5_vl":
        return tiny_policy.build(path, seed)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _llama_tokenizer(family) if family in MARKS else tiny_policy.byte_tokenizer()
    ids = dict(tokenizer.get_vocab())
    makers = {"qwen2_vl": _qwen2, "qwen3_vl": _qwen3, "qwen3_5": _qwen3_5, "llava": _llava}
    makers["llava_onevision"] = _onevision
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = makers.get(family, _internvl)(tokenizer, ids)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1 if "embed" in name else parameter[0].numel() ** -0.5)
            if name.endswith("A_log"):  # by the library's own, a state is forgotten within two tokens
                parameter.data.uniform_(0.002, 0.2).log_()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(path)
    _processor(family, tokenizer).save_pretrained(path)
    if family == "llava_onevision":  # released files have a level in their names that transformers 5 leaves out
        weights = load_file(path / "model.safetensors")
        released = {name.replace("vision_tower.", "vision_tower.vision_model."): w for name, w in weights.items()}
        save_file(released, path / "model.safetensors", metadata={"format": "pt"})
    marks = MARKS[family].values() if family in MARKS else SPECIAL[3:]
    return PolicySpec(
        path=str(path),
        dtype="float32",
        image_token_id=ids[IMAGE.get(family, "<|image_pad|>")],
        eos_token_ids=(tokenizer.eos_token_id,),
        banned_token_ids=tuple(sorted(ids[mark] for mark in marks)),
        renames=(("model.vision_tower.", "model.vision_tower.vision_model."),) if family == "llava_onevision" else (),
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
    size = {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 64}
    vision = size | {
        "depth": 3,
        "num_heads": 2,
        "patch_size": 14,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **_special(ids))
    )


def _qwen3_5(tokenizer: PreTrainedTokenizerFast, ids: dict[str, int]) -> Any:
    """Three layers of linear attention and one of the other kind; vLLM's kernels on the CPU want these dimensions."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    linear = {"linear_num_key_heads": 1, "linear_num_value_heads": 2}
    text = TEXT | heads | linear | {"vocab_size": len(tokenizer), "rope_parameters": rope}
    size = {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 64}
    vision = size | {"depth": 2, "num_heads": 2, "patch_size": 14, "num_position_embeddings": 64}
    return Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True, **_special(ids))
    )


def _llava(tokenizer: PreTrainedTokenizerFast, ids: dict[str, int]) -> Any:
    vision = CLIPVisionConfig(image_size=TILE, patch_size=14, projection_dim=64, **VISION)
    text = LlamaConfig(vocab_size=len(tokenizer), **TEXT)
    image = ids["<|image_pad|>"]
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=image, tie_word_embeddings=True)
    )


def _onevision(tokenizer: PreTrainedTokenizerFast, ids: dict[str, int]) -> Any:
    """16 tokens a tile; an image is a tile that shows it whole and two or four of its parts."""
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(image_size=TILE, patch_size=14, vision_use_head=False, **VISION),
            text_config=_small_text(tokenizer),
            image_token_id=ids["<image>"],
            video_token_id=ids["<video>"],
            image_grid_pinpoints=PINPOINTS,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            tie_word_embeddings=True,
        )
    )


def _internvl(tokenizer: PreTrainedTokenizerFast, ids: dict[str, int]) -> Any:
    """4 tokens a tile between two marks; an image is up to four tiles, and a tile that shows it whole if it is more."""
    return InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=InternVLVisionConfig(image_size=[TILE, TILE], patch_size=[14, 14], **VISION),
            text_config=_small_text(tokenizer),
            image_token_id=ids["<IMG_CONTEXT>"],
            tie_word_embeddings=True,
        )
    )


def _small_text(tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    """Two heads of 32: vLLM's attention on the CPU knows none of 16."""
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = TEXT | {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen2Config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **shape, **ends)


def _llama_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Ids 0 .. 255 are the bytes; a first token goes before every text."""
    special = ["<unk>", "<s>", "</s>", *MARKS[family].values()]
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *map(chr, range(33, 127)), *special]
    ids = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    spaces = decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([spaces[0], decoders.ByteFallback(), decoders.Fuse(), spaces[1]])
    first = {"single": "<s> $A", "pair": "<s> $A <s> $B", "special_tokens": [("<s>", ids["<s>"])]}
    backend.post_processor = processors.TemplateProcessing(**first)
    backend.add_special_tokens(special)
    backend.add_tokens(ANSWERS)
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=MARKS[family], **ends)


def _chat_template(image: str) -> str:
    return (
        "{% for m in messages %}{{ {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT: '}[m['role']] }}"
        "{% for c in m['content'] if c['type'] == 'image' %}" + image + "\n{% endfor %}"
        "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}"
        "{{ '</s>' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


def _processor(family: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    chat = _chat_template(IMAGE[family]) if family in IMAGE else CHAT_TEMPLATE
    template = {"tokenizer": tokenizer, "chat_template": chat}
    if family == "llava_onevision":
        return LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS),
            video_processor=LlavaOnevisionVideoProcessor(size=SQUARE),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            **template,
        )
    if family == "internvl":
        tiles = GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4)
        video = InternVLVideoProcessor(size=SQUARE)
        return InternVLProcessor(image_processor=tiles, video_processor=video, image_seq_length=4, **template)
    if family == "llava":
        return LlavaProcessor(
            image_processor=CLIPImageProcessor(size=SQUARE, crop_size=SQUARE, do_center_crop=False),
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
