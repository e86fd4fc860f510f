"""The rollout engine against bare vLLM: what do the Ray actor and our bookkeeping cost?

    python -m benchmarks.rollout --json
    python -m benchmarks.rollout --json --device cuda --dtype bfloat16 --policy DIR --side 840 --prompts 64 --tokens 384

Both sides: the same engine arguments, environment, prompts, seeds and sampling; all requests handed over at once;
seconds until the last answer is there. Ours: `RolloutPool.generate`, a Ray actor in another process, encoded images in,
`Group`s out. Rival: `AsyncLLM` driven directly in this process, images already decoded, outputs left as vLLM made them.
The two take turns, the one that begins alternating, after a warm-up round each; medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any

import ray
from PIL import Image

from benchmarks.common import parser, print_result
from perception.config import ModelConfig, PlacementConfig, RolloutConfig
from perception.types import PolicySpec, Prompt, SamplingSpec
from rollout.defaults import by_placement
from rollout.engine import engine_args, environment, sampling_params
from rollout.pool import RolloutPool
from runtime.placement import anywhere
from tests import builders

QUESTION = "Find the small red circle left of the blue square."


def make_prompts(policy: PolicySpec, count: int, side: int, round_number: int) -> list[Prompt]:
    """New images every round, as in training: only the chat prefix may be found in a cache."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy.path)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
    prompts = []
    for seed in range(round_number * count, (round_number + 1) * count):
        asked = builders.sample(str(seed), height=side, width=side, question=QUESTION, task="ground")
        images = (builders.noise_image(seed, side, side, "jpg"),)
        prompts.append(builders.prompt(asked, token_ids=ids, images=images, seed=seed * 1000))
    return prompts


async def timed(answer: Callable[[list[Any]], Awaitable[int]], requests: list[Any]) -> dict[str, float]:
    start = time.perf_counter()
    tokens = await answer(requests)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": tokens, "tokens_per_s": tokens / seconds}


class Ours:
    def __init__(
        self, policy: PolicySpec, config: RolloutConfig, sampling: SamplingSpec, placement: PlacementConfig
    ) -> None:
        self._pool = RolloutPool(policy, config, placement, anywhere(placement, "engine", 1))
        self._sampling = sampling

    async def start(self) -> None:
        await self._pool.start()

    async def answer(self, prompts: list[Prompt]) -> int:
        groups = await asyncio.gather(*(self._pool.generate(prompt, self._sampling) for prompt in prompts))
        return sum(t.sampled_tokens for group in groups for t in group.trajectories)

    async def shutdown(self) -> None:
        await self._pool.shutdown()


class BareVllm:
    def __init__(self, policy: PolicySpec, config: RolloutConfig, sampling: SamplingSpec):
        self._policy, self._config, self._sampling = policy, config, sampling

    async def start(self) -> None:
        from vllm.v1.engine.async_llm import AsyncLLM

        self._engine = AsyncLLM.from_engine_args(engine_args(self._policy, self._config))

    async def answer(self, requests: list[tuple[dict[str, Any], int]]) -> int:
        return sum(await asyncio.gather(*(self._one(request, seed) for request, seed in requests)))

    async def _one(self, request: dict[str, Any], seed: int) -> int:
        params = sampling_params(self._policy, self._sampling, seed)
        async for output in self._engine.generate(request, params, f"bare-{seed}"):
            final = output
        return sum(len(completion.token_ids) for completion in final.outputs)

    async def shutdown(self) -> None:
        self._engine.shutdown()
        del self._engine  # its finaliser fails once the interpreter is going down


def bare_request(prompt: Prompt) -> tuple[dict[str, Any], int]:
    images = [Image.open(io.BytesIO(handle.ref)).convert("RGB") for handle in prompt.images]
    return {"prompt_token_ids": list(prompt.token_ids), "multi_modal_data": {"image": images}}, prompt.seed


async def measure(arguments: argparse.Namespace, policy: PolicySpec, config: RolloutConfig) -> None:
    sampling = SamplingSpec(n=arguments.n, temperature=1.0, max_new_tokens=arguments.tokens)
    gpus = 0.5 if arguments.device == "cuda" else 0.0
    placement = PlacementConfig(name="benchmark", device=arguments.device, threads=arguments.threads, engine_gpus=gpus)
    config = by_placement(config, placement)
    ours = Ours(policy, config, sampling, placement)
    rival = BareVllm(policy, config, sampling)
    rounds: dict[str, list[dict[str, float]]] = {"ours": [], "rival": []}
    await ours.start()
    await rival.start()
    try:
        for number in range(arguments.repeats + 1):
            prompts = make_prompts(policy, arguments.prompts, arguments.side, number)
            bare = [bare_request(prompt) for prompt in prompts]
            for side in ("ours", "rival") if number % 2 else ("rival", "ours"):
                took = await (timed(ours.answer, prompts) if side == "ours" else timed(rival.answer, bare))
                if number:  # round 0 warms both up
                    rounds[side].append(took)
    finally:
        await rival.shutdown()
        await ours.shutdown()

    figures = {side: {key: median(took[key] for took in all_) for key in all_[0]} for side, all_ in rounds.items()}
    ratio = figures["ours"]["tokens_per_s"] / figures["rival"]["tokens_per_s"]
    spread = {side: [round(took["tokens_per_s"], 1) for took in all_] for side, all_ in rounds.items()}
    settings = {key: value for key, value in vars(arguments).items() if key != "json"}
    if arguments.json:
        print_result("rollout", figures["ours"], figures["rival"], ratio, settings, tokens_per_s_of_rounds=spread)
    else:
        for side, figure in figures.items():
            print(f"{side:6} {figure['tokens_per_s']:9.1f} tokens/s  {figure['seconds']:.2f} s  rounds {spread[side]}")
        print(f"ratio  {ratio:.3f}")


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--policy", default="assets/policy", help="policy directory in Hugging Face format")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    made.add_argument("--side", type=int, default=112, help="image side in pixels")
    made.add_argument("--prompts", type=int, default=48)
    made.add_argument("--n", type=int, default=8, help="samples per prompt")
    made.add_argument("--tokens", type=int, default=96, help="new tokens at most")
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--threads", type=int, default=1)
    arguments = made.parse_args()
    os.environ.update(environment(arguments.device, arguments.threads))
    from launch.run.prompts import read_policy_spec

    policy = read_policy_spec(
        ModelConfig(path=str(Path(arguments.policy).resolve()), segmenter="", dtype=arguments.dtype)
    )
    config = RolloutConfig(
        max_new_tokens=arguments.tokens,
        max_model_len=arguments.tokens + 256 + (arguments.side // 28 + 1) ** 2,
        max_num_seqs=128,
        max_images=1,
        kv_cache_mb=96 if arguments.device == "cpu" else 0,
    )
    ray.init(include_dashboard=False, log_to_driver=False)
    try:
        asyncio.run(measure(arguments, policy, config))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
