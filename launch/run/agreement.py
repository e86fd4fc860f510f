"""What the policy's own files say, held against one another and against the settings before anything starts."""

import math

from launch.run.prompts import PromptMaker
from perception.config import Config
from perception.errors import UserError


def check_agreement(config: Config, prompts: PromptMaker) -> None:
    """Raises UserError: one line that names both sides of the first contradiction."""
    text, tokenizer, length = prompts.config.get_text_config(), prompts.tokenizer, config.rollout.max_model_len
    rope = getattr(text, "rope_parameters", None) or {}
    stretched = rope.get("factor", 1) if rope.get("rope_type") in ("linear", "dynamic") else 1  # yarn's are counted
    places, rows = getattr(text, "max_position_embeddings", math.inf) * stretched, text.vocab_size
    last, beyond = max(tokenizer.get_vocab().values()), [mark for mark in prompts.marks if not 0 <= mark < rows]
    image, own = getattr(prompts.config, "image_token_id", None), prompts.image_token_id
    shown = prompts.processor.image_token_ids  # another id than the placeholder in Gemma 3
    stray = bool(prompts.end) and tokenizer.encode(prompts.end, add_special_tokens=False)[0] not in prompts.ends
    fewest, most = prompts.limits if prompts.native else (0, 0)
    wrong = {
        f"rollout.max_model_len={length}, but config.json has {places:.0f} positions; lower it": length > places,
        f"tokenizer.json has id {last}, but config.json a vocabulary of {rows} rows": last >= rows,
        f"config.json or the processor names ids {beyond}, beyond the vocabulary of {rows} rows": bool(beyond),
        f"image_token_id={image} in config.json, {own} in tokenizer.json": image not in (None, own, *shown),
        f"the chat template ends a turn with {prompts.end[:30]!r}, which is no token: no answer would end": stray,
        "neither tokenizer nor chat template has an end of turn; set eos_token": not prompts.ends,
        f"images get {fewest} pixels at least, {most} at most; mend model.min_pixels, model.max_pixels": fewest > most,
    }
    if found := [what for what, is_so in wrong.items() if is_so]:
        raise UserError(f"model.path={config.model.path}: {found[0]}")
