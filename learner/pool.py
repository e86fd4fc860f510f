"""The controller's side of the learner: starts the ranks, deals groups out to them, waits with a limit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from perception import metric_catalog as catalog
from perception.config import AlgorithmConfig, LearnerConfig, PlacementConfig
from perception.types import Group, LearnerReport, PolicySpec, TrainGroup, WeightBucket

KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
"""glibc's malloc would give every large activation back to the kernel, and take its pages anew in the next layer."""


@ray.remote
class _Host:
    """Makes the rank inside its own process: torch and DeepSpeed stay out of the controller's."""

    def __init__(self, rank: int, world: int, **settings: Any) -> None:
        from learner.rank import LearnerRank

        self._rank = LearnerRank(rank, world, **settings)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._rank, method)(*arguments)


class LearnerPool:
    """`config.ranks` DeepSpeed ranks, one Ray actor each, on the given bundles of a placement group (or anywhere).

    Every wait ends after `config.timeout_s` with a TimeoutError that names the call.
    """

    def __init__(
        self,
        policy: PolicySpec,
        config: LearnerConfig,
        algorithm: AlgorithmConfig,
        placement: PlacementConfig,
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        deterministic: bool = False,
        group: PlacementGroup | None = None,
        bundles: Sequence[int] = (),
    ) -> None:
        self._config, self._algorithm = config, algorithm
        environment = {"DS_ACCELERATOR": placement.device, "TOKENIZERS_PARALLELISM": "false"}
        if placement.device == "cpu":
            environment |= KEEP_FREED_MEMORY
        if placement.threads:
            environment["OMP_NUM_THREADS"] = str(placement.threads)
        self._ranks = [
            _Host.options(  # type: ignore[attr-defined]
                num_cpus=placement.learner_cpus,
                num_gpus=placement.learner_gpus,
                runtime_env={"env_vars": environment},
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundles[rank]) if group else "DEFAULT",
            ).remote(
                rank,
                config.ranks,
                policy=policy,
                config=config,
                algorithm=algorithm,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                device=placement.device,
                transport=placement.transport,
                threads=placement.threads,
                seed=seed,
                deterministic=deterministic,
            )
            for rank in range(config.ranks)
        ]

    async def start(self) -> float:
        """Load the policy on every rank; returns the seconds of the slowest."""
        address, port = (await self._wait("open_store", [self._ranks[0].call.remote("open_store")]))[0]
        return max(await self._all("start", address, port))

    async def train_step(self, groups: Sequence[TrainGroup]) -> LearnerReport:
        """`algorithm.updates` optimizer steps over all groups, cut in the order they come, `algorithm.epochs` times.

        Raises ValueError when no trajectory holds a sampled token.
        """
        if not any(t.sampled_tokens for entry in groups for t in entry.group.trajectories):
            raise ValueError(f"nothing to learn from: none of the step's {len(groups)} groups holds a sampled token")
        batches = [deal(batch, len(self._ranks)) for batch in mini_batches(groups, self._algorithm.updates)]
        shares = [[batch[rank] for batch in batches] for rank in range(len(self._ranks))]
        reports: list[LearnerReport] = await self._each("train_step", shares)
        return LearnerReport(metrics=reports[0].metrics, seconds=max(report.seconds for report in reports))

    async def parity(self, groups: Sequence[Group]) -> dict[str, float]:
        """How far the learner's log-probs are from those the engine reported, over all sampled tokens.

        Mean and maximum of |difference|, and the mean importance ratio learner / engine: 1 up to rounding.
        """
        learner = [tokens for group in await self._of_groups("logprobs", groups) for tokens in group]
        engine = [turn.logprobs for group in groups for one in group.trajectories for turn in one.turns]
        difference = np.concatenate(learner) - np.concatenate([np.asarray(logprobs) for logprobs in engine])
        return {
            catalog.LOGPROB_MISMATCH: float(np.abs(difference).mean()),
            catalog.LOGPROB_MISMATCH_MAX: float(np.abs(difference).max()),
            catalog.RATIO: float(np.exp(difference).mean()),
        }

    async def kl(self, groups: Sequence[Group]) -> list[tuple[float, ...]]:
        """Per group and trajectory: `algorithm.kl` of the current policy to the starting one, summed over tokens."""
        return await self._of_groups("kl", groups)

    async def _of_groups(self, method: str, groups: Sequence[Group]) -> list[Any]:
        """What the ranks' method says of each group, in the order of `groups`."""
        entries = [TrainGroup(group=group, advantages=(0.0,) * len(group.trajectories)) for group in groups]
        shares = deal(entries, len(self._ranks))
        answers = await self._each(method, shares)
        found = {
            id(entry): values
            for share, answer in zip(shares, answers, strict=True)
            for entry, values in zip(share, answer, strict=True)
        }
        return [found[id(entry)] for entry in entries]

    async def buckets(self, receivers: tuple[str, ...] = ()) -> AsyncIterator[WeightBucket]:
        """The current weights, bucket by bucket. The next one is packed while the caller is busy with this one.

        `receivers` are the engines that will take them (`RolloutPool.begin_update`). When the last bucket has been
        asked for, all have left the learner; `release_buckets` once the engines have loaded them.
        """
        opened = self._submit("sender", "open", receivers, ranks=1)
        (count,) = await self._wait("opening the weight sync", opened)
        pending = self._submit("sender", "fill_bucket", 0)
        for index in range(count):
            bucket = (await self._wait(f"packing weight bucket {index + 1} of {count}", pending))[0]
            if index + 1 < count:
                pending = self._submit("sender", "fill_bucket", index + 1)
            yield bucket
        await self._wait("sending the weight buckets", self._submit("sender", "flush", ranks=1))

    async def release_buckets(self) -> None:
        """Free the buffers of the last sync."""
        await self._wait("releasing the weight buckets", self._submit("sender", "release", ranks=1))

    async def save_checkpoint(self, folder: str, client_state: dict[str, Any]) -> None:
        await self._all("save_checkpoint", folder, client_state)

    async def load_checkpoint(self, folder: str) -> dict[str, Any]:
        """Restore model, optimizer and random state; returns the client state that was saved with them."""
        return (await self._all("load_checkpoint", folder))[0]

    async def export(self, folder: str) -> None:
        """Write the policy in Hugging Face format to a folder that rank 0's node can reach."""
        await self._all("export", folder)

    def shutdown(self) -> None:
        for rank in self._ranks:
            ray.kill(rank)

    def _submit(self, method: str, *arguments: Any, ranks: int | None = None) -> list[ray.ObjectRef]:
        return [rank.call.remote(method, *arguments) for rank in self._ranks[:ranks]]

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        return await self._wait(method, self._submit(method, *arguments))

    async def _each(self, method: str, shares: Sequence[Any]) -> list[Any]:
        refs = [rank.call.remote(method, share) for rank, share in zip(self._ranks, shares, strict=True)]
        return await self._wait(method, refs)

    async def _wait(self, method: str, refs: Sequence[ray.ObjectRef]) -> list[Any]:
        try:
            return list(await asyncio.wait_for(asyncio.gather(*refs), self._config.timeout_s))
        except TimeoutError as error:
            message = f"learner: {method} on {len(refs)} rank(s) took longer than {self._config.timeout_s:g} s"
            raise TimeoutError(message) from error


def mini_batches(groups: Sequence[TrainGroup], count: int) -> list[Sequence[TrainGroup]]:
    """Cut, in order, into at most `count` parts of as equal a number of groups as can be."""
    ends = [len(groups) * part // count for part in range(count + 1)]
    return [groups[start:end] for start, end in pairwise(ends) if end > start]


def deal(groups: Sequence[TrainGroup], ranks: int) -> list[list[TrainGroup]]:
    """Every rank's groups: the longest first, each to the rank with the least to do so far. Some may get none."""
    shares: list[list[TrainGroup]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for entry in sorted(groups, key=_tokens, reverse=True):
        rank = load.index(min(load))
        shares[rank].append(entry)
        load[rank] += _tokens(entry)
    return shares


def _tokens(entry: TrainGroup) -> int:
    """Of the group as one row, but for what its images expand to."""
    later = (turn.input_ids for one in entry.group.trajectories for turn in one.turns[1:])
    return (
        len(entry.group.prompt.token_ids)
        + sum(map(len, later))
        + sum(t.sampled_tokens for t in entry.group.trajectories)
    )
