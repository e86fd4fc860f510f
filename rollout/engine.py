"""One vLLM engine as a Ray actor: groups in and out, and new weights while requests are in flight.

Token in, token out: prompts go in unexpanded, sampled ids and their log-probs come out as sampled. A request that fails
becomes a group of marked trajectories; only the engine's own death is an exception (`EngineDead`).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import ray
from PIL import Image

from perception.config import RolloutConfig
from perception.families import engine_name
from perception.images import ImageCache
from perception.types import (
    EngineInfo,
    EngineStats,
    Failure,
    FailureKind,
    Feed,
    Group,
    ImageHandle,
    PolicySpec,
    Prompt,
    SamplingSpec,
    Trajectory,
    Turn,
    UpdateReport,
    VersionSpan,
    WeightBucket,
)

if TYPE_CHECKING:
    from vllm import CompletionOutput, RequestOutput, SamplingParams
    from vllm.config.model import ModelDType
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.logprobs import FlatLogprobs

_BANNED_BIAS = -1e9
"""Added to a banned id's logit: its probability is then exactly 0 in float32, as under a mask of -inf."""
_DECODED_IMAGES = 32
_FETCH_TIMEOUT_S = 60.0
_SHUTDOWN_TIMEOUT_S = 1.0
_ARRIVAL_POLL_S = 0.005
_SEED_STRIDE, _LARGEST_SEED = 1_000_003, 0x7FFFFFFF
"""Later turns of a sample are drawn from seeds far from those of its group's first turns."""


class EngineDead(RuntimeError):
    """The vLLM engine behind this actor is gone; only a new actor helps."""


class UpdateFailed(RuntimeError):
    """New weights did not get into the engine; the message names the stage."""


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


def engine_args(policy: PolicySpec, config: RolloutConfig) -> AsyncEngineArgs:
    """Exactly what the engine is built with; the benchmark's bare engine takes the same."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    return AsyncEngineArgs(
        model=policy.path,
        dtype=cast("ModelDType", policy.dtype),
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        limit_mm_per_prompt={"image": config.max_images, "video": 0},
        block_size=config.block_size,
        enable_prefix_caching=True,
        kv_cache_memory_bytes=config.kv_cache_mb << 20 or None,
        gpu_memory_utilization=config.gpu_memory,
        enforce_eager=config.enforce_eager,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        distributed_executor_backend="uni",
        worker_extension_cls="rollout.worker_extension.WeightReceiver",
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )


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
        logit_bias=dict.fromkeys(policy.banned_token_ids, _BANNED_BIAS),
        stop_token_ids=list(policy.eos_token_ids),
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,  # any other kind may lose some of the n samples
    )


class RolloutEngine:
    """Call `start` first. All methods may run concurrently, except that updates must not overlap one another."""

    def __init__(self, policy: PolicySpec, config: RolloutConfig, device: str, threads: int) -> None:
        self._created = time.monotonic()
        self._policy = policy
        self._config = config
        os.environ.update(environment(device, threads))  # the actor owns its process
        self._images = ImageCache(fetch=_fetch, capacity=_DECODED_IMAGES)
        self._decoder = ThreadPoolExecutor(max_workers=1)  # one, so that no image is decoded twice at once
        self._ids = itertools.count()
        self._version = 0
        self._switches: dict[tuple[str, int], list[tuple[int, int]]] = {}
        self._stats = EngineStats()
        self._staging, self._nbytes = 0.0, 0

    async def start(self) -> EngineInfo:
        """Build the engine with the weights at `policy.path`, which count as version 0."""
        import vllm
        from transformers import AutoTokenizer
        from vllm.v1.engine.async_llm import AsyncLLM

        self._tokenizer = AutoTokenizer.from_pretrained(self._policy.path)
        self._engine = AsyncLLM.from_engine_args(engine_args(self._policy, self._config))
        self._native_versions = hasattr(self._engine, "update_weight_version")
        if self._native_versions:
            await self._engine.update_weight_version("0")
        return EngineInfo(version=vllm.__version__, seconds=time.monotonic() - self._created)

    async def generate(self, prompt: Prompt, sampling: SamplingSpec) -> Group:
        """Sample a group in one request, so that its n answers share the image and the prompt's key-value cache.

        Raises EngineDead; every other failure comes back as marked trajectories.
        """
        output = await self._request(prompt.token_ids, prompt.images, sampling, prompt.seed)
        if isinstance(output, str):
            group = failed_group(prompt, sampling.n, output)
        else:
            feed = Feed(input_ids=prompt.token_ids, images=prompt.images, view=None)
            done = (self._trajectory(c.index, feed, output, c) for c in output.outputs)
            group = Group(prompt=prompt, trajectories=tuple(done))
        self._stats.failures += sum(t.failure is not None for t in group.trajectories)
        self._stats.sampled_tokens += sum(t.sampled_tokens for t in group.trajectories)
        return group

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
            trajectory = replace(failed_trajectory(prompt, index, output), turns=turns)
        else:
            new = self._trajectory(index, feed, output, output.outputs[0])
            length = turns[-1].prompt_tokens + len(turns[-1].token_ids) if turns else 0
            cached = min(length, output.num_cached_tokens or 0)
            last = (replace(turn, prefix_tokens=length, prefix_cached=cached) for turn in new.turns)
            trajectory = replace(new, turns=(*turns, *last))
        self._stats.failures += trajectory.failure is not None
        self._stats.sampled_tokens += len(trajectory.turns[-1].token_ids) if len(trajectory.turns) > len(turns) else 0
        return trajectory

    async def stage(self, bucket: WeightBucket, rank: int) -> None:
        """Hold some of the new parameters until `end_update`; sampling goes on. Any order, each exactly once.

        `rank` is this engine's among the receivers of a broadcast, from 1.
        """
        if not self._staging:
            self._staging = time.monotonic()
            await self._engine.collective_rpc("drop_held")  # of an update that failed
        slots = [(engine_name(s.name, self._policy.renames), s.dtype, s.shape, s.offset) for s in bucket.slots]
        payload = await bucket.payload if isinstance(bucket.payload, ray.ObjectRef) else bucket.payload
        if bucket.transport == "store":
            with tempfile.NamedTemporaryFile(dir=_shared_folder(bucket.nbytes), prefix="relook-weights-") as file:
                await asyncio.to_thread(_write, file, payload)
                await self._engine.collective_rpc("hold_file", args=(file.name, slots))
        elif bucket.transport == "ipc":
            await self._engine.collective_rpc("hold_ipc", args=(payload, slots))
        else:
            # Twice: of the two waits it is `end_update`'s that can name what is late.
            group = (bucket.transport, *payload, rank, 2 * self._config.request_timeout_s)
            await self._engine.collective_rpc("hold_broadcast", args=(group, bucket.nbytes, slots))
        self._nbytes += bucket.nbytes

    async def end_update(self, version: int, checksum: bool) -> UpdateReport:
        """Once all staged buckets are here: pause, load them, resume.

        Every cache of the old weights is dropped: prefixes, images, their features. Requests in flight go on from the
        tokens they have; what they sample from here on is `version`'s. Raises UpdateFailed naming the stage that took
        too long, and what vLLM raises for a parameter the model does not have.
        """
        doing, limit = "receiving the staged buckets", self._config.request_timeout_s
        staging, nbytes = self._staging or time.monotonic(), self._nbytes
        self._staging, self._nbytes = 0.0, 0
        try:
            async with asyncio.timeout(limit):
                while not all(await self._engine.collective_rpc("all_held")):
                    await asyncio.sleep(_ARRIVAL_POLL_S)
                doing, began = "pausing", time.monotonic()
                await self._pause()
                doing = "loading the staged buckets"
                if self._native_versions:
                    named = self._engine.update_weight_version(str(version))
                    await asyncio.gather(self._engine.collective_rpc("load_held"), named)
                else:
                    self._note_switch()
                    await self._engine.collective_rpc("load_held")
                self._version = version
                doing = "resuming"
                await self._engine.resume_generation()
                resumed = time.monotonic()
                doing = "summing up its weights"
                found = (await self._engine.collective_rpc("sum_weights"))[0] if checksum else None
        except TimeoutError as error:
            raise UpdateFailed(f"{doing} took more than {limit:g} s (rollout.request_timeout_s)") from error
        return UpdateReport(
            version=version,
            transfer_seconds=began - staging,
            pause_seconds=resumed - began,
            nbytes=nbytes,
            checksum=found,
        )

    async def _pause(self) -> None:
        if not self._native_versions:
            await self._engine.pause_generation(mode="keep", clear_cache=True)
            return
        # What `pause_generation` does but for its last 20 ms of sleep, in which only `_note_switch` has an interest.
        await self._engine.renderer.clear_mm_cache_async()
        await self._engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=True)

    async def stats(self) -> EngineStats:
        return replace(self._stats, image_hits=self._images.hits, image_misses=self._images.misses)

    async def shutdown(self) -> None:
        self._decoder.shutdown()
        self._engine.shutdown(timeout=_SHUTDOWN_TIMEOUT_S)
        del self._engine

    async def _request(
        self, ids: Sequence[int], images: Sequence[ImageHandle], sampling: SamplingSpec, seed: int
    ) -> RequestOutput | str:
        """What vLLM makes of unexpanded ids and their images, or in one line why it made nothing."""
        from vllm.v1.engine.exceptions import EngineDeadError

        self._stats.requests += 1
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
            async for output in self._engine.generate(request, params, str(next(self._ids))):
                final = output
        except EngineDeadError as error:
            raise EngineDead(str(error)) from error
        except Exception as error:  # noqa: BLE001 - vLLM's classes for a bad request differ between versions
            return str(error.__cause__ or error)
        self._stats.prompt_tokens += len(final.prompt_token_ids or ())
        self._stats.cached_tokens += final.num_cached_tokens or 0
        return final

    def _trajectory(self, index: int, feed: Feed, request: RequestOutput, completion: CompletionOutput) -> Trajectory:
        ids = tuple(completion.token_ids)
        logprobs = cast("FlatLogprobs", completion.logprobs)
        turn = Turn(
            input_ids=feed.input_ids,
            images=feed.images,
            token_ids=ids,
            logprobs=tuple(logprobs.logprobs),
            versions=self._spans(request.request_id, completion),
            text=str(self._tokenizer.decode(list(ids), skip_special_tokens=True)),
            finish_reason=completion.finish_reason or "unfinished",
            view=feed.view,
            prompt_tokens=len(request.prompt_token_ids or ()),
        )
        return Trajectory(index=index, turns=(turn,) if ids else (), failure=_failure(turn))

    def _spans(self, request: str, completion: CompletionOutput) -> tuple[VersionSpan, ...]:
        if self._native_versions:
            spans = completion.weight_versions or ()
            return tuple(VersionSpan(version=int(s.version), start=s.start, end=s.end) for s in spans)
        switches = self._switches.pop((request, completion.index), [])
        switches.append((self._version, len(completion.token_ids)))
        starts = [0, *(end for _, end in switches)]
        return tuple(
            VersionSpan(version=version, start=start, end=end)
            for start, (version, end) in zip(starts, switches, strict=False)
            if end > start
        )

    def _note_switch(self) -> None:
        """For a vLLM that keeps no versions: how many tokens each sample in flight has of the old one."""
        for state in self._engine.output_processor.request_states.values():
            if state.detokenizer is not None:
                sample = (state.external_req_id, state.request_index)
                self._switches.setdefault(sample, []).append((self._version, state.detokenizer.num_output_tokens()))


def failed_group(prompt: Prompt, n: int, detail: str) -> Group:
    """A group of which nothing is known but why."""
    return Group(prompt=prompt, trajectories=tuple(failed_trajectory(prompt, index, detail) for index in range(n)))


def failed_trajectory(prompt: Prompt, index: int, detail: str) -> Trajectory:
    failure = Failure(kind=FailureKind.ENGINE, detail=f"sample {prompt.sample.id}: {detail}")
    return Trajectory(index=index, turns=(), failure=failure)


def _failure(turn: Turn) -> Failure | None:
    if turn.finish_reason not in ("stop", "length"):
        return Failure(kind=FailureKind.ENGINE, detail=f"vLLM ended the sample with {turn.finish_reason!r}")
    if not turn.token_ids:
        return Failure(kind=FailureKind.EMPTY, detail="vLLM returned no token")
    if turn.finish_reason == "length":
        return Failure(kind=FailureKind.TRUNCATED, detail=f"no end of answer within {len(turn.token_ids)} tokens")
    return None


def _fetch(ref: Any) -> bytes:
    return ray.get(ref, timeout=_FETCH_TIMEOUT_S) if isinstance(ref, ray.ObjectRef) else ref


def _write(file: IO[bytes], payload: Any) -> None:
    file.write(memoryview(payload))
    file.flush()


def _shared_folder(nbytes: int) -> str | None:
    """Shared memory where there is room (containers often have 64 MiB), else the folder for temporary files."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > nbytes else None
