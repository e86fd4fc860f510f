"""The controller's side of the learner: starts the ranks, deals groups out to them, waits with a limit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from perception import names
from perception.config import AlgorithmConfig, LearnerConfig, PlacementConfig
from perception.types import Group, LearnerReport, PolicySpec, TrainGroup, WeightBucket


@ray.remote
class _Host:
    """Makes the rank inside its own process: torch and DeepSpeed stay out of the controller's."""

    def __init__(self, rank: int, world: int, **settings: Any) -> None:
        from learner.worker import LearnerRank

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
        seed: int,
        deterministic: bool = False,
        group: PlacementGroup | None = None,
        bundles: Sequence[int] = (),
    ) -> None:
        self._config = config
        environment = {"DS_ACCELERATOR": placement.device, "TOKENIZERS_PARALLELISM": "false"}
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
        """One optimizer step over all groups, in whatever order they come.

        Raises ValueError when no trajectory holds a sampled token.
        """
        if not any(t.sampled_tokens for entry in groups for t in entry.group.trajectories):
            raise ValueError(f"nothing to learn from: none of the step's {len(groups)} groups holds a sampled token")
        reports: list[LearnerReport] = await self._each("train_step", shards(groups, len(self._ranks)))
        return LearnerReport(metrics=reports[0].metrics, seconds=max(report.seconds for report in reports))

    async def parity(self, groups: Sequence[Group]) -> dict[str, float]:
        """How far the learner's log-probs are from those the engine reported, over all sampled tokens.

        Mean and maximum of |difference|, and the mean importance ratio learner / engine: 1 up to rounding.
        """
        entries = [TrainGroup(group=group, advantages=(0.0,) * len(group.trajectories)) for group in groups]
        shares = shards(entries, len(self._ranks))
        answers = await self._each("logprobs", shares)
        learner = [tokens for answer in answers for group in answer for tokens in group]
        engine = [t.logprobs for share in shares for e in share for one in e.group.trajectories for t in one.turns]
        difference = np.concatenate(learner) - np.concatenate([np.asarray(logprobs) for logprobs in engine])
        return {
            names.LOGPROB_MISMATCH: float(np.abs(difference).mean()),
            names.LOGPROB_MISMATCH_MAX: float(np.abs(difference).max()),
            names.RATIO: float(np.exp(difference).mean()),
        }

    async def buckets(self) -> AsyncIterator[WeightBucket]:
        """The current weights, bucket by bucket. The next one is packed while the caller is busy with this one."""
        (count,) = await self._wait("bucket_count", [self._ranks[0].call.remote("bucket_count")])
        pending = self._submit("pack_bucket", 0)
        for index in range(count):
            bucket = (await self._wait("pack_bucket", pending))[0]
            if index + 1 < count:
                pending = self._submit("pack_bucket", index + 1)
            yield bucket

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

    def _submit(self, method: str, *arguments: Any) -> list[ray.ObjectRef]:
        return [rank.call.remote(method, *arguments) for rank in self._ranks]

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


def shards(groups: Sequence[TrainGroup], ranks: int) -> list[list[TrainGroup]]:
    """Deal groups out, long ones first and back and forth, so that ranks have equally much to do.

    Every rank gets the same number; where they do not go round, a filler (a group without trajectories) stands in.
    """
    share: list[list[TrainGroup]] = [[] for _ in range(ranks)]
    for place, entry in enumerate(sorted(groups, key=_tokens, reverse=True)):
        lap, seat = divmod(place, ranks)
        share[seat if lap % 2 == 0 else ranks - 1 - seat].append(entry)
    size = max(len(one) for one in share)
    stand_in = TrainGroup(group=Group(prompt=groups[0].group.prompt, trajectories=()), advantages=())
    return [one + [stand_in] * (size - len(one)) for one in share]


def _tokens(entry: TrainGroup) -> int:
    return sum(len(turn.input_ids) + len(turn.token_ids) for t in entry.group.trajectories for turn in t.turns)
