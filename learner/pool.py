"""The learner's ranks as one pool: deals groups out to them and takes their collective calls, each with a limit."""

import asyncio
from collections import ChainMap
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from functools import reduce
from itertools import chain, pairwise
from operator import or_
from typing import TypeVar

import numpy as np

from learner.rank import LearnerRank
from learner.weights import WeightSender
from perception import metric_catalog as catalog
from perception.config import Config
from perception.types import Group, LearnerReport, PolicySpec
from perception.weights import WeightBucket
from runtime.actors import ActorPool, Call, Limit, call
from runtime.placement import Seat

R = TypeVar("R")


class LearnerPool:
    """One DeepSpeed rank per seat. Every failure and every wait that is too long is an ActorError."""

    def __init__(
        self,
        policy: PolicySpec,
        config: Config,
        seats: Sequence[Seat],
        turn: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
    ) -> None:
        """`turn`: around what takes the whole of its GPUs, where it shares them in turns (`placement.sleep`)."""
        self._turn, self._updates = turn, config.algorithm.updates
        self._limit = Limit(config.learner.timeout_s, "learner.timeout_s")
        self.actors: ActorPool[LearnerRank] = ActorPool(
            "learner rank", LearnerRank, lambda rank: (rank, len(seats), policy, config), seats, start=self._limit
        )

    async def start(self) -> float:
        """Load the policy on every rank; returns the seconds of the slowest."""
        self.actors.make()
        first = self.actors.slots[:1]
        ((address, port),) = await self.actors.each([call(LearnerRank.open_store)], self._limit, first)
        return max(await self.actors.start(address, port))

    async def update(self, groups: Sequence[Group]) -> LearnerReport:
        """`algorithm.updates` optimizer steps over all groups, cut in the order they come, `algorithm.epochs` times.

        Where none of them holds a sampled token that counts, the steps have no gradient.
        """
        ranks = len(self.actors.slots)
        batches = [deal(batch, ranks) for batch in mini_batches([*map(_bare, groups)], self._updates)]
        calls = [call(LearnerRank.update, [batch[rank] for batch in batches]) for rank in range(ranks)]
        async with self._turn():
            reports = await self.actors.each(calls, self._limit)
        return LearnerReport(metrics=reports[0].metrics, seconds=max(report.seconds for report in reports))

    async def parity(self, groups: Sequence[Group]) -> dict[str, float]:
        """How far the learner's log-probs are from those the rollout engines reported, over all sampled tokens.

        Mean and maximum of |difference|, and the mean importance ratio learner / engine: 1 up to rounding. There must
        be a token that counts.
        """
        difference = await self.logprobs(groups) - reported(groups)
        return {
            catalog.LOGPROB_MISMATCH: float(np.abs(difference).mean()),
            catalog.LOGPROB_MISMATCH_MAX: float(np.abs(difference).max()),
            catalog.RATIO: float(np.exp(difference).mean()),
        }

    async def logprobs(self, groups: Sequence[Group]) -> np.ndarray:
        """(N,) float32 log-probs of all sampled tokens that count, in their order, under the current weights."""
        return np.concatenate([one for found in await self._of_groups(LearnerRank.logprobs, groups) for one in found])

    async def with_kl(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with `algorithm.kl` of the current policy to the starting one on every trajectory that counts."""
        return list(map(_with_kl, groups, await self._of_groups(LearnerRank.kl, groups)))

    async def _of_groups(
        self, method: Callable[[LearnerRank, Sequence[Group]], list[R]], groups: Sequence[Group]
    ) -> list[R]:
        """The results of the ranks' method, one for each group, in the order of `groups`."""
        bare = [_bare(group) for group in groups]
        shares = deal(bare, len(self.actors.slots))
        async with self._turn():
            answers = await self.actors.each([call(method, share) for share in shares], self._limit)
        found = dict(zip(map(id, chain(*shares)), chain(*answers), strict=True))
        return [found[id(group)] for group in bare]

    async def buckets(self, receivers: tuple[str, ...] = ()) -> AsyncIterator[WeightBucket]:
        """The current weights, bucket by bucket. The next one is filled while the caller is busy with this one.

        `receivers` are the workers that will take them (`RolloutPool.begin_update`). When the last bucket has been
        asked for, all have left the learner; `release_buckets` once the engines have loaded them.
        """
        count = await self._ask_sender(call(WeightSender.open, receivers), "opening the weight sync")
        pending = self._filled(0, count)
        for index in range(count):
            bucket = _as_one(await pending)
            if index + 1 < count:
                pending = self._filled(index + 1, count)
            yield bucket
        await self._ask_sender(call(WeightSender.flush), "sending the weight buckets")

    async def perturb(self, back: bool = False) -> None:
        """Change every trained weight a little, or `back`. The optimizer's masters stay: for `launch.run.examine`."""
        await self._all(call(LearnerRank.perturb, back))

    async def release_buckets(self) -> None:
        """Free the buffers of the last sync."""
        await self._all(call(LearnerRank.send, call(WeightSender.release)), "releasing the weight buckets")

    async def save(self, folder: str) -> dict[str, str]:
        """Write a checkpoint to a folder that all ranks reach, a file each; returns sha256 by file name."""
        async with self._turn():
            return dict(ChainMap(*await self._all(call(LearnerRank.save, folder))))

    async def load(self, folder: str, weights_only: bool = False) -> None:
        """Restore weights, optimizer and random state; `weights_only`: the optimizer begins anew."""
        async with self._turn():
            await self._all(call(LearnerRank.load, folder, weights_only))

    async def offload(self) -> None:
        """Masters, moments and gradients to host memory; the weights stay, to be sent."""
        await self._all(call(LearnerRank.offload))

    async def reload(self) -> None:
        """Bring back what `offload` moved."""
        await self._all(call(LearnerRank.reload))

    async def export(self, folder: str) -> None:
        """Write the policy in Hugging Face format to a folder that rank 0's node can reach."""
        await self._all(call(LearnerRank.export, folder))

    async def shutdown(self) -> None:
        await self.actors.shutdown()

    def _filled(self, index: int, count: int) -> asyncio.Task[list[WeightBucket | None]]:
        filling = call(LearnerRank.send, call(WeightSender.fill_bucket, index))
        return asyncio.create_task(self._all(filling, f"filling weight bucket {index + 1} of {count}"))

    async def _ask_sender(self, wanted: Call[WeightSender, R], doing: str) -> R:
        """Call rank 0's weight sender."""
        sending = call(LearnerRank.send, wanted)
        return (await self.actors.each([sending], self._limit, self.actors.slots[:1], doing))[0]

    async def _all(self, wanted: Call[LearnerRank, R], doing: str = "") -> list[R]:
        return await self.actors.each([wanted] * len(self.actors.slots), self._limit, doing=doing)


def _as_one(filled: Sequence[WeightBucket | None]) -> WeightBucket:
    """The bucket of the ranks that filled it: rank 0 or, by CUDA IPC, each with the handle for its own GPU."""
    first, *others = (bucket for bucket in filled if bucket is not None)
    return replace(first, payload=reduce(or_, (bucket.payload for bucket in others), first.payload))


def mini_batches(groups: Sequence[Group], count: int) -> list[Sequence[Group]]:
    """Cut, in order, into at most `count` parts of as equal a number of groups as can be."""
    ends = [len(groups) * part // count for part in range(count + 1)]
    return [groups[start:end] for start, end in pairwise(ends) if end > start]


def deal(groups: Sequence[Group], ranks: int) -> list[list[Group]]:
    """Every rank's groups: the longest first, each to the rank with the least to do so far. Some may get none."""
    shares: list[list[Group]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for group in sorted(groups, key=_tokens, reverse=True):
        rank = load.index(min(load))
        shares[rank].append(group)
        load[rank] += _tokens(group)
    return shares


def _tokens(group: Group) -> int:
    """The group's length as one row, but for what its images expand to."""
    later = (turn.input_ids for one in group.trajectories for turn in one.turns[1:])
    return len(group.prompt.token_ids) + sum(map(len, later)) + sum(one.sampled_tokens for one in group.trajectories)


def _bare(group: Group) -> Group:
    """Without what the reward workers found, which the ranks have no use for."""
    return replace(group, trajectories=tuple(replace(one, score=None) for one in group.trajectories))


def reported(groups: Sequence[Group]) -> np.ndarray:
    """(N,) log-probs of all sampled tokens that count, in their order, as the rollout engine reported them."""
    turns = (turn for group in groups for one in group.trajectories if not one.excluded for turn in one.turns)
    return np.array([value for turn in turns for value in turn.logprobs], np.float64)


def _with_kl(group: Group, values: Sequence[float]) -> Group:
    pairs = zip(group.trajectories, values, strict=True)
    return replace(group, trajectories=tuple(one if one.excluded else replace(one, kl=value) for one, value in pairs))
