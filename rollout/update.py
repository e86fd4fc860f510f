"""New weights in a running vLLM engine: staged while it samples, loaded in a pause; and which version sampled what."""

import asyncio
import time
from collections.abc import Awaitable
from contextlib import ExitStack
from typing import Any

import ray

from perception.config import RolloutConfig
from perception.types import VersionSpan
from perception.weights import UpdateReport, WeightBucket
from rollout.death import DeathWatch
from runtime.weights import shared_file, total

_ARRIVAL_POLL_S = 0.005


def version_spans(completion: Any) -> tuple[VersionSpan, ...]:
    """Which versions sampled the tokens of a finished vLLM `CompletionOutput`."""
    spans = completion.weight_versions or ()
    return tuple(VersionSpan(version=int(span.version), start=span.start, end=span.end) for span in spans)


class UpdateFailed(RuntimeError):
    """New weights did not get into the engine; the message names the stage."""


class WeightUpdates:
    """The updates of one `AsyncLLM`, one after the other. Every call raises EngineDead when it dies."""

    def __init__(self, engine: Any, watch: DeathWatch, config: RolloutConfig) -> None:
        self._engine, self._watch, self._config = engine, watch, config
        self._staging, self._nbytes, self._doing = 0.0, 0, ""

    async def stage(self, bucket: WeightBucket, receiver: int) -> None:
        """Hold a bucket until `end`, as member `receiver` of a broadcast."""
        if not self._staging:
            self._staging = time.monotonic()
            await self._rpc("staging a weight bucket", "drop_held")  # of an update that failed
        payload = await bucket.payload if isinstance(bucket.payload, ray.ObjectRef) else bucket.payload
        with ExitStack() as until_held:
            if bucket.transport == "store":
                payload = until_held.enter_context(await asyncio.to_thread(shared_file, payload)).name
            elif bucket.transport != "ipc":
                # Twice the limit, so that `end` times out first: its error names what it waited for.
                payload = (*payload, receiver, 2 * self._config.request_timeout_s)
            await self._rpc("staging a weight bucket", "hold", bucket.transport, payload, bucket.nbytes, bucket.slots)
        self._nbytes += bucket.nbytes

    async def end(self, version: int, checksum: bool) -> UpdateReport:
        """Pause, load all that is staged, resume. Raises UpdateFailed naming the stage that took too long."""
        limit = self._config.request_timeout_s
        try:
            async with asyncio.timeout(limit):
                return await self._end(version, checksum)
        except TimeoutError as error:
            raise UpdateFailed(f"{self._doing} took more than {limit:g} s (rollout.request_timeout_s)") from error

    async def label(self, version: int) -> None:
        """Stamp what is sampled from here on with `version`. The engine must be paused or idle."""
        await self._engine.update_weight_version(str(version))

    async def _end(self, version: int, checksum: bool) -> UpdateReport:
        staging, nbytes = self._staging or time.monotonic(), self._nbytes
        self._staging, self._nbytes = 0.0, 0
        while not all(await self._rpc("receiving the staged buckets", "all_held")):
            await asyncio.sleep(_ARRIVAL_POLL_S)
        began = time.monotonic()
        await self._step("pausing", self._pause())
        load = asyncio.gather(self._engine.collective_rpc("load_held"), self.label(version))
        await self._step("loading the staged buckets", load)
        await self._step("resuming", self._engine.resume_generation())
        resumed = time.monotonic()
        seconds = {"transfer_seconds": began - staging, "pause_seconds": resumed - began}
        summed = total(await self._rpc("summing up its weights", "sum_weights")) if checksum else None
        return UpdateReport(version=version, nbytes=nbytes, checksum=summed, **seconds)

    async def _pause(self) -> None:
        """Every cache of the old weights is dropped: prefixes, images, their features."""
        # What `pause_generation` does but for its last 20 ms of sleep.
        await self._engine.renderer.clear_mm_cache_async()
        await self._engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=True)

    async def _rpc(self, doing: str, method: str, *arguments: Any) -> list[Any]:
        """Call a method of `WeightReceiver` on every worker; returns what each returned."""
        return await self._step(doing, self._engine.collective_rpc(method, args=arguments))

    async def _step(self, doing: str, call: Awaitable[Any]) -> Any:
        self._doing = doing
        return await self._watch.or_death(call, doing)
