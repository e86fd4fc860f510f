"""One vLLM engine as a Ray actor: groups in and out, and new weights while requests are in flight.

Token in, token out: prompts go in unexpanded, sampled ids and their log-probs come out as sampled. A request that fails
becomes a group of marked trajectories; only the engine's own death is an exception (`EngineDead`).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

from PIL import Image

from perception.config import RolloutConfig
from perception.errors import UserError
from perception.families import engine_name
from perception.frames import PIXEL_LIMITS
from perception.grammar import clean
from perception.images import ImageCache
from perception.types import BANNED_LOGIT, Feed, Group, ImageHandle, PolicySpec, Prompt, SamplingSpec, Trajectory, Turn
from perception.weights import EngineInfo, UpdateReport, WeightBucket
from rollout.death import DeathWatch, EngineDead
from rollout.failures import failed_group, failed_trajectory, failure_of
from rollout.update import WeightUpdates, version_spans
from runtime.objects import fetch

if TYPE_CHECKING:
    from vllm import CompletionOutput, RequestOutput, SamplingParams
    from vllm.config.model import ModelDType
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.logprobs import FlatLogprobs

EnginePart = Literal["weights", "kv_cache"]
"""A part of the engine that may be away from the GPU."""
_SHUTDOWN_TIMEOUT_S = 1.0
_NEXT_TO_NOTHING = 0.01
_VISION_TOWERS = ("*visual*", "*vision_*")
"""Layers that fp8 leaves as they are, by the names vLLM gives them."""
_SEED_STRIDE, _LARGEST_SEED = 1_000_003, 0x7FFFFFFF
"""Later turns of a sample are drawn from seeds far from those of its group's first turns."""


def environment(device: str, threads: int) -> dict[str, str]:
    """Variables vLLM's processes must see before vLLM is imported."""
    variables = {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore", "VLLM_NO_USAGE_STATS": "1"}
    if threads:
        variables["OMP_NUM_THREADS"] = str(threads)
    if device == "cuda":
        return variables | {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    return variables | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # lets the worker live in the engine's own process: 10 s less to start
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the cores are shared with the learner and the reward workers
        "TORCHDYNAMO_DISABLE": "1",  # else the sampler is compiled inside the first request
    }


def engine_args(policy: PolicySpec, config: RolloutConfig, sleeps: bool = False) -> AsyncEngineArgs:
    """Exactly what the engine is built with; the benchmark's bare engine takes the same.

    `config` is one of `by_placement`. `sleeps`: it can leave the GPU for a while.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    return AsyncEngineArgs(
        model=policy.path,
        dtype=cast("ModelDType", policy.dtype),
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_batched_tokens or None,
        limit_mm_per_prompt={"image": config.max_images, "video": 0},
        mm_processor_kwargs=policy.pixels and {"size": dict(zip(PIXEL_LIMITS, policy.pixels, strict=True))},
        block_size=config.block_size,
        enable_prefix_caching=True,
        kv_cache_memory_bytes=config.kv_cache_mb << 20 or None,
        # vLLM does not start where less than this share is free, not even with a KV cache of a given size.
        gpu_memory_utilization=_NEXT_TO_NOTHING if config.kv_cache_mb else config.gpu_memory,
        enforce_eager=bool(config.enforce_eager),
        enable_sleep_mode=sleeps,
        quantization="fp8_per_channel" if config.quantization else None,
        quantization_config={"ignore": list(_VISION_TOWERS)} if config.quantization else None,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        tensor_parallel_size=config.tensor_parallel,
        # "uni" would hang with several workers, and left alone vLLM picks "ray" inside an actor.
        distributed_executor_backend="mp" if config.tensor_parallel > 1 else "uni",
        # Where the family can, each worker has the whole vision tower and its share of the images: a tower's heads need
        # not be divisible.
        mm_encoder_tp_mode="data" if config.tensor_parallel > 1 else "weights",
        worker_extension_cls="rollout.worker_extension.WeightReceiver",
        scheduler_cls="rollout.worker_extension.scheduler",
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )


def check_fp8() -> None:
    """Raises UserError where the GPU has no fp8 arithmetic: vLLM would say so in its engine's process only."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda() and not current_platform.supports_fp8():
        raise UserError("rollout.quantization=fp8 needs compute capability 8.9 (Ada, Hopper) or more: take null")


def sampling_params(policy: PolicySpec, sampling: SamplingSpec, seed: int) -> SamplingParams:
    """n seeded samples without top-p or top-k: mask and temperature are all the learner needs to reproduce them."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=sampling.n,
        temperature=sampling.temperature,
        max_tokens=sampling.max_new_tokens,
        seed=seed,
        logprobs=0,
        flat_logprobs=True,
        logit_bias=dict.fromkeys(policy.banned_token_ids, BANNED_LOGIT),
        stop_token_ids=list(policy.eos_token_ids),
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,  # any other kind may lose some of the n samples
    )


class RolloutEngine:
    """Call `start` first. All methods may run concurrently, except that updates must not overlap one another."""

    def __init__(self, policy: PolicySpec, config: RolloutConfig, device: str, threads: int, sleeps: bool = False):
        self._created = time.monotonic()
        self._policy = policy
        self._config, self._sleeps = config, sleeps
        os.environ.update(environment(device, threads))  # the actor owns its process
        self._images = ImageCache(fetch)
        self._decoder = ThreadPoolExecutor(max_workers=1)  # one, so that no image is decoded twice at once
        self._ids = itertools.count()

    async def start(self) -> EngineInfo:
        """Build the engine with the weights at `policy.path`, which count as version 0.

        Raises UserError where the GPU has no fp8 and `rollout.quantization` asks for it.
        """
        import vllm
        from transformers import AutoTokenizer
        from vllm.v1.engine.async_llm import AsyncLLM

        if self._config.quantization:
            check_fp8()
        self._tokenizer = AutoTokenizer.from_pretrained(self._policy.path)
        self._engine = AsyncLLM.from_engine_args(engine_args(self._policy, self._config, self._sleeps))
        self._watch = DeathWatch(self._engine)
        self._updates = WeightUpdates(self._engine, self._watch, self._config)
        await self._watch.or_death(self._updates.label(0), "starting")
        return EngineInfo(version=vllm.__version__, seconds=time.monotonic() - self._created)

    async def generate(self, prompt: Prompt, sampling: SamplingSpec) -> Group:
        """Sample a group in one request, so that its n answers share the image and the prompt's key-value cache.

        Raises EngineDead; every other failure comes back as marked trajectories.
        """
        output = await self._request(prompt.token_ids, prompt.images, sampling, prompt.seed)
        if isinstance(output, str):
            return failed_group(prompt, sampling.n, output)
        feed = Feed(input_ids=prompt.token_ids, images=prompt.images, view=None)
        expanded = tuple(output.prompt_token_ids or ())  # one for all: it is sent once
        done = (self._trajectory(c.index, feed, expanded, output, c) for c in output.outputs)
        return Group(prompt=prompt, trajectories=tuple(done))

    async def sample(
        self, prompt: Prompt, index: int, turns: tuple[Turn, ...], feed: Feed | None, sampling: SamplingSpec
    ) -> Trajectory:
        """One more turn of one sample: the first one (`turns` empty, `feed` None), or the one after `turns` and `feed`.

        The group's prompt and the sample's own earlier turns come from the prefix cache. A first turn is the one that
        `generate` samples at this index. Raises EngineDead; every other failure comes back marked, after the turns
        there were.
        """
        feed = feed or Feed(input_ids=prompt.token_ids, images=prompt.images, view=None)
        ids = [token for turn in turns for token in (*turn.input_ids, *turn.token_ids)]
        images = [image for turn in turns for image in turn.images]
        spec, seed = replace(sampling, n=1), (prompt.seed + index + len(turns) * _SEED_STRIDE) & _LARGEST_SEED
        output = await self._request([*ids, *feed.input_ids], [*images, *feed.images], spec, seed)
        if isinstance(output, str):
            return replace(failed_trajectory(prompt, index, output), turns=turns)
        length = turns[-1].prompt_tokens + len(turns[-1].token_ids) if turns else 0
        expanded = tuple((output.prompt_token_ids or [])[length:])
        new = self._trajectory(index, feed, expanded, output, output.outputs[0])
        cached = min(length, output.num_cached_tokens or 0)
        last = (replace(turn, prefix_tokens=length, prefix_cached=cached) for turn in new.turns)
        return replace(new, turns=(*turns, *last))

    async def stage(self, bucket: WeightBucket, receiver: int) -> None:
        """Hold some of the new parameters until `end_update`; sampling goes on. Any order, each exactly once.

        `receiver` is the member number of this engine's first worker in a broadcast, from 1; the others follow.
        """
        slots = tuple(replace(slot, name=engine_name(slot.name, self._policy.renames)) for slot in bucket.slots)
        await self._updates.stage(replace(bucket, slots=slots), receiver)

    async def end_update(self, version: int, checksum: bool) -> UpdateReport:
        """Once all staged buckets are here: pause, load them, resume.

        Every cache of the old weights is dropped: prefixes, images, their features. Requests in flight go on from the
        tokens they have; what they sample from here on is `version`'s. Raises UpdateFailed naming the stage that took
        too long, EngineDead, and what vLLM raises for a parameter the model does not have.
        """
        return await self._updates.end(version, checksum)

    async def sleep(self) -> None:
        """Leave the GPU: the weights go to host memory, the KV cache is dropped. Nothing may be in flight."""
        await self._watch.or_death(self._engine.sleep(level=1), "going to sleep")

    async def wake(self, tags: Sequence[EnginePart]) -> None:
        """Come back to the GPU with these parts; with the last of them sampling goes on."""
        await self._watch.or_death(self._engine.wake_up(list(tags)), "waking up")

    async def trace(self, file: str = "") -> None:
        """`Traced.trace` of its first worker."""
        await self._watch.or_death(self._engine.collective_rpc("trace", args=(file,)), "tracing")

    async def shutdown(self) -> None:
        self._decoder.shutdown()
        self._engine.shutdown(timeout=_SHUTDOWN_TIMEOUT_S)
        del self._engine

    async def _request(
        self, ids: Sequence[int], images: Sequence[ImageHandle], sampling: SamplingSpec, seed: int
    ) -> RequestOutput | str:
        """vLLM's output for unexpanded ids and their images, or one line that says why there is none."""
        try:
            placeholders = ids.count(self._policy.image_token_id)
            if placeholders != len(images):  # vLLM itself accepts both too many and too few
                raise ValueError(f"the prompt has {placeholders} image placeholders for {len(images)} images")
            loop = asyncio.get_running_loop()
            pixels = [await loop.run_in_executor(self._decoder, self._images.get, handle) for handle in images]
            request: Any = {"prompt_token_ids": list(ids)}
            if pixels:  # as PIL: vLLM takes an array's first axis for channels
                request["multi_modal_data"] = {"image": [Image.fromarray(image) for image in pixels]}
                request["multi_modal_uuids"] = {"image": [handle.key for handle in images]}  # else vLLM hashes pixels
            params = sampling_params(self._policy, sampling, seed)
            return await self._watch.or_death(self._sampled(request, params), "sampling")
        except EngineDead:
            raise
        except Exception as error:  # noqa: BLE001 - vLLM's classes for a bad request differ between versions
            return str(error) or str(error.__cause__)  # vLLM's own wrapper says nothing

    async def _sampled(self, request: Any, params: SamplingParams) -> RequestOutput:
        async for output in self._engine.generate(request, params, str(next(self._ids))):
            final = output
        return final

    def _trajectory(
        self, index: int, feed: Feed, expanded: tuple[int, ...], request: RequestOutput, completion: CompletionOutput
    ) -> Trajectory:
        ids = tuple(completion.token_ids)
        logprobs = cast("FlatLogprobs", completion.logprobs)
        turn = Turn(
            input_ids=feed.input_ids,
            images=feed.images,
            token_ids=ids,
            logprobs=tuple(logprobs.logprobs),
            versions=version_spans(completion),
            text=clean(answer_text(self._policy, self._tokenizer, ids)),
            finish_reason=completion.finish_reason or "unfinished",
            view=feed.view,
            expanded_ids=expanded,
            prompt_tokens=len(request.prompt_token_ids or ()),
        )
        return Trajectory(index=index, turns=(turn,) if ids else (), failure=failure_of(turn))


def answer_text(policy: PolicySpec, tokenizer: Any, ids: Sequence[int]) -> str:
    """What the chat format opened, and what was sampled but for the end of the turn and padding: tags may be special
    tokens, too."""
    silent = {*policy.eos_token_ids, tokenizer.pad_token_id}
    return policy.opened + str(tokenizer.decode([token for token in ids if token not in silent]))
