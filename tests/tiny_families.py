"""Tiny random policies of other families than `tiny_policy`'s, saved with tokenizer and processor.

Weights are drawn wider than the library draws them: answers must depend on what the image shows. `qwen2_vl`, `qwen3_vl`
and `llava` have the byte tokenizer of `tiny_policy`; the others one of their own, Llama's in kind, with another chat
format. They and `qwen3_vl` have whole answers as tokens, so that what they sample is often a readable answer.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from perception.types import PolicySpec
from synthetic.policies import CHAT_TEMPLATE, SPECIAL
from tests import tiny_policy
from tests.tiny_models import GEMMA, MODELS, processor

IDEFICS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
    **{f"tile_{row}_{column}": f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)},
}
PIXTRAL = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
MARKS = {
    "llava_onevision": {"image_token": "<image>", "video_token": "<video>"},
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "idefics3": IDEFICS,
    "smolvlm": {**IDEFICS, "video_token": "<video>"},
    "mistral3": PIXTRAL,
    "pixtral": PIXTRAL,
    "gemma3": {f"{mark}_token": token for mark, token in GEMMA.items()},
}
IMAGE = {"internvl": "<IMG_CONTEXT>", "mistral3": "[IMG]", "pixtral": "[IMG]", "gemma3": GEMMA["boi"]}
"""What stands for an image in a prompt, where it is not <image>."""
BANNED = {
    "llava": ("<|image_pad|>",),
    "idefics3": ("<image>",),
    "smolvlm": ("<image>", "<video>"),
    "gemma3": (GEMMA["boi"], GEMMA["image"]),
}
"""Tokens that no answer holds, where they are not all of a family's marks."""
SHORTENED = ("llava", "llava_onevision", "gemma3")
"""Released files have a level in the names of their towers' weights that transformers 5 leaves out."""
ANSWERS = [
    f'<answer>[{{"bbox_2d": [{x}, {x}, {x + 300}, {x + 400}], "point_2d": [{x + 150}, {x + 200}]}}]</answer>'
    for x in range(0, 600, 20)
]


def build(family: str, path: Path, seed: int = 0) -> PolicySpec:
    """family: qwen2_5_vl or one of `tiny_models.MODELS`."""
    if family == "qwen2_5_vl":
        return tiny_policy.build(path, seed)
    path.mkdir(parents=True, exist_ok=True)
    own = family in MARKS
    tokenizer = _llama_tokenizer(family) if own else tiny_policy.byte_tokenizer()
    tokenizer.add_tokens(ANSWERS if family == "qwen3_vl" else [])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[family](tokenizer)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1 if "embed" in name else parameter[0].numel() ** -0.5)
            if name.endswith("A_log"):  # by the library's own, a state is forgotten within two tokens
                parameter.data.uniform_(0.002, 0.2).log_()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(path)
    image = IMAGE.get(family, "<image>") if own else "<|image_pad|>"
    chat = _chat_template(image) if own else CHAT_TEMPLATE
    processor(family, tokenizer=tokenizer, chat_template=chat).save_pretrained(path)
    if family in SHORTENED:
        weights = load_file(path / "model.safetensors")
        released = {name.replace("vision_tower.", "vision_tower.vision_model."): w for name, w in weights.items()}
        save_file(released, path / "model.safetensors", metadata={"format": "pt"})
    marks = BANNED.get(family, MARKS[family].values() if own else SPECIAL[3:])
    return PolicySpec(
        path=str(path),
        dtype="float32",
        image_token_id=tokenizer.convert_tokens_to_ids(image),
        eos_token_ids=(tokenizer.eos_token_id,),
        banned_token_ids=tuple(sorted(tokenizer.convert_tokens_to_ids([*marks]))),
        renames=(("model.vision_tower.", "model.vision_tower.vision_model."),) if family in SHORTENED else (),
    )


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
    backend.add_tokens([*ANSWERS, *("\n" * count for count in range(1, 5) if family == "gemma3")])
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
