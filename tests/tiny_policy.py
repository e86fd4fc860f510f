"""A real Qwen2.5-VL of about 0.3 M random parameters, with tokenizer and image processor, saved in Hugging Face format.

Small enough for every test, yet everything is there: vision tower, M-RoPE, chat tokens, tied embeddings.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from perception.types import PolicySpec
from synthetic import policies
from synthetic.policies import SPECIAL

IMAGE_TOKENS = "<|vision_start|><|image_pad|><|vision_end|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return policies.chat_tokenizer(backend)


def build(path: Path, seed: int = 0) -> PolicySpec:
    """Save the policy under `path` (made if missing) and return what engine and learner must agree on.

    The same seed gives the same weights. float32; patches of 14 px merged 2x2, so image sides are multiples of 28.
    """
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 7, 7]},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": 64,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
        # The library's 0.02 would leave every answer near uniform whatever the image shows.
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1 if "embed_tokens" in name else parameter[0].numel() ** -0.5)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    policies.save(model, tokenizer, path, max_side=224)
    return PolicySpec(
        path=str(path),
        dtype="float32",
        image_token_id=ids["<|image_pad|>"],
        eos_token_ids=(ids["<|im_end|>"],),
        banned_token_ids=tuple(
            ids[t] for t in ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
        ),
    )
