"""Qwen3.5's linear attention: a packed row whose answers go on from their prompt's state, against one padded row each.

    python -m benchmarks.gated_delta_net --json

One group of a tiny random Qwen3.5 (three layers of linear attention, one of the other kind), a prompt of 745 tokens and
8 answers of 64: forward and backward pass of the learner's policy on the CPU, in float32 and with the reference form of
the rule. The rival is the same policy on padded rows, through transformers' own forward pass. The two take turns;
medians. `logprob_difference` and `gradient_difference` (relative) are those between the two: the run fails where they
are larger than rounding, for then they did not do the same work.
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

from benchmarks.common import options, print_result
from learner.policy import Policy, load_policy
from perception.config import LearnerConfig
from perception.types import Group, PolicySpec
from tests import tiny_families
from tests.builders import sampled_group
from tests.gradients import distance, evaluate

LOGPROBS, GRADIENT = 1e-5, 1e-5
IMAGE_TOKENS = 4
"""Of 56 x 56 pixels."""


def make_group(spec: PolicySpec, prompt: int, answers: int, tokens: int) -> Group:
    """Random ids, every answer of the same length; the prompt's tokens are counted with the image's."""
    rng = np.random.default_rng(0)
    made = sampled_group(
        spec, rng, n=answers, prompt_tokens=prompt - IMAGE_TOKENS - 4
    )  # three ids before it, one after

    def answer(number: int) -> Any:
        ids = tuple(rng.integers(0, 256, tokens).tolist())
        one = made.trajectories[number]
        return replace(one, turns=(replace(one.turns[0], token_ids=ids, logprobs=(-5.0,) * tokens),))

    return replace(made, trajectories=tuple(map(answer, range(answers))))


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
        spec = tiny_families.build("qwen3_5", Path(folder))
        sides: dict[str, Policy] = {
            rows: load_policy(spec, 1.0, LearnerConfig(rows=rows), lambda handle: handle.ref)  # type: ignore[arg-type]
            for rows in ("packed", "padded")
        }
    groups = [make_group(spec, arguments.prompt, arguments.answers, arguments.tokens)]
    seconds: dict[str, list[float]] = {rows: [] for rows in sides}
    for _ in range(arguments.rounds + 1):
        found = {}
        for rows, policy in sides.items():
            began = time.perf_counter()
            found[rows] = evaluate(policy, groups, 1 << 20)
            seconds[rows].append(time.perf_counter() - began)
    (mine, my_gradient), (theirs, gradient) = found["packed"], found["padded"]
    apart = {
        "logprob_difference": max((mine[key] - theirs[key]).abs().max().item() for key in theirs),
        "gradient_difference": distance(my_gradient, gradient),
    }
    if not (apart["logprob_difference"] <= LOGPROBS and apart["gradient_difference"] <= GRADIENT):
        raise RuntimeError(f"packed and padded rows disagree: {apart}")
    ours, rival = ({"seconds": median(seconds[rows][1:])} for rows in ("packed", "padded"))
    ratio = rival["seconds"] / ours["seconds"]
    print_result("gated_delta_net", ours, rival, ratio, vars(arguments), ratio_is="rival / ours", **apart)


if __name__ == "__main__":
    main()
