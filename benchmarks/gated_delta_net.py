"""Qwen3.5's linear attention: a packed row whose answers go on from their prompt's state, against one padded row each.

    python -m benchmarks.gated_delta_net --json

One group of a small random Qwen3.5 (three layers of linear attention, one of full attention), a prompt of 745 tokens
and 8 answers of 64: forward and backward pass of the learner's policy on the CPU, in float32, with the reference form
of the rule. The rival is the same policy on padded rows, through transformers' own forward pass. The two take turns;
medians of seconds of the processor. `apart` says how far the log-probs and, relatively, the gradients of the two are:
the run fails where that is more than rounding, for then they did not do the same work.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from benchmarks.common import options, print_result
from benchmarks.learner_batch import read_policy
from learner.policy import Policy, load_policy
from learner.rows import pieces
from perception.config import LearnerConfig
from perception.types import Group, PolicySpec
from synthetic import policies
from tests.builders import sampled_group

APART = 1e-5
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}
VISION = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 64}


def write_policy(folder: Path) -> PolicySpec:
    """A policy of random weights whose states are forgotten over hundreds of tokens."""
    tokenizer = policies.make_tokenizer(["0123456789"])
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in policies.SPECIAL}
    marks = {f"{name}_token_id": ids[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
    marks |= {f"{name}_token_id": ids[f"<|{name}_pad|>"] for name in ("image", "video")}
    vision = VISION | {"patch_size": policies.PATCH, "num_position_embeddings": 64}
    torch.manual_seed(0)
    model: Any = Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=TEXT | {"vocab_size": len(tokenizer)}, vision_config=vision, **marks)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.uniform_(0.002, 0.2).log_()
        elif parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1 if "embed" in name else parameter[0].numel() ** -0.5)
    policies.save(model, tokenizer, folder, max_side=224)
    return read_policy(folder, "float32")


def make_group(spec: PolicySpec, prompt: int, answers: int, tokens: int) -> Group:
    """Random ids, every answer of the same length, no image."""
    rng = np.random.default_rng(0)
    made = sampled_group(spec, rng, n=answers, prompt_tokens=prompt - 3, images=0)

    def said() -> tuple[int, ...]:
        return tuple(rng.integers(0, 256, tokens).tolist())

    turns = [replace(one.turns[0], token_ids=said(), logprobs=(-5.0,) * tokens) for one in made.trajectories]
    pairs = zip(made.trajectories, turns, strict=True)
    return replace(made, trajectories=tuple(replace(one, turns=(turn,)) for one, turn in pairs))


def step(policy: Policy, group: Group) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Processor seconds, log-probs of the sampled tokens, and the gradient of their sum weighted by advantages."""
    began = time.process_time()
    batch = policy.collate([*pieces([group], policy.layout, 1 << 20)])
    logprobs, _ = policy(batch)
    (logprobs * batch.tokens.advantages).sum().backward()
    seconds = time.process_time() - began
    found = [p.grad.flatten() for p in policy.model.model.language_model.parameters() if p.grad is not None]
    gradient = torch.cat(found)
    policy.zero_grad(set_to_none=True)
    return seconds, logprobs.detach(), gradient


def main() -> None:
    arguments = options(
        __doc__,
        prompt=(745, "tokens of the prompt"),
        answers=(8, "of the group"),
        tokens=(64, "of each answer"),
        rounds=(5, "of each side, after one to warm up"),
        threads=(1, "cores"),
    )
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        spec = write_policy(Path(folder))
        ours, rival = (
            load_policy(spec, 1.0, LearnerConfig(rows=rows), lambda handle: handle.ref)  # type: ignore[arg-type]
            for rows in ("packed", "padded")
        )
    group = make_group(spec, arguments.prompt, arguments.answers, arguments.tokens)
    rounds = [(step(ours, group), step(rival, group)) for _ in range(arguments.rounds + 1)][1:]
    (_, mine, my_gradient), (_, theirs, gradient) = rounds[-1]
    apart = {
        "logprob_difference": float((mine - theirs).abs().max()),
        "gradient_difference": float((my_gradient - gradient).norm() / gradient.norm()),
    }
    if not max(apart.values()) <= APART:
        raise RuntimeError(f"packed and padded rows disagree: {apart}")
    mine_s, theirs_s = (median(side[0] for side in sides) for sides in zip(*rounds, strict=True))
    result = ({"seconds": mine_s}, {"seconds": theirs_s}, theirs_s / mine_s, vars(arguments))
    print_result("gated_delta_net", *result, ratio_is="rival / ours", apart=apart)


if __name__ == "__main__":
    main()
