"""Rewards of a step from the components of its answers: weights, ranks, and the rule for failures."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from perception.config import RewardConfig, weights
from perception.types import Group, Trajectory
from reward_workers.group_rank import group_ranks
from reward_workers.ranking import RankStore


def make_store(config: RewardConfig) -> RankStore | None:
    """The rank store the reward needs, if it ranks against earlier steps."""
    ranked = tuple(weights(config.ranked))
    return RankStore(ranked, config.ecdf) if config.rank == "ecdf" and ranked else None


def rewarded(groups: list[Group], config: RewardConfig, store: RankStore | None, kl_coef: float = 0.0) -> list[Group]:
    """The groups with a reward on every scored trajectory: weighted components, plus what `rank` makes of the ranked
    ones, less `kl_coef` * its KL where that was measured.

    `groups` in prompt order. The step's values are appended to `store` but not flushed: call `store.flush()` once the
    step is done.
    """
    done = [_rewarded(group, config, store, kl_coef) for group in groups]
    if store is not None:
        for group in groups:
            asked = [one for one in group.trajectories if not (config.ecdf.exclude_unparsed and one.failure)]
            if rows := _rows(asked, store.names):
                store.append(group.prompt.sample.task, np.array(rows))
    return done


def _rewarded(group: Group, config: RewardConfig, store: RankStore | None, kl_coef: float) -> Group:
    extras = _by_group(group, config) if config.rank == "group" else _by_component(group, config, store)
    plain = weights(config.components)

    def with_reward(trajectory: Trajectory, extra: float) -> Trajectory:
        if trajectory.score is None:
            return trajectory
        reward = extra + sum(weight * trajectory.score.metrics[name] for name, weight in plain.items())
        if trajectory.failure is not None and config.unparsed_reward is not None:
            reward = config.unparsed_reward
        return replace(trajectory, reward=reward - kl_coef * (trajectory.kl or 0.0))

    return replace(group, trajectories=tuple(map(with_reward, group.trajectories, extras)))


def _by_group(group: Group, config: RewardConfig) -> list[float]:
    """The one soft rank, which has the weights of all ranked components together, or 1 where none are named."""
    weight = sum(weights(config.ranked).values()) if config.ranked else 1.0
    return [weight * rank for rank in group_ranks(group, config.group, failed=config.unparsed_reward is None)]


def _by_component(group: Group, config: RewardConfig, store: RankStore | None) -> list[float]:
    """Weighted quantiles of the ranked components, or their weighted values where there is no store; 0 unmeasured."""
    measured = np.array([trajectory.score is not None for trajectory in group.trajectories])
    ranked = weights(config.ranked)
    rows, of_ranked = _rows(group.trajectories, ranked), tuple(ranked.values())
    values = np.array(rows, np.float64).reshape(len(rows), len(ranked))
    extras = np.zeros(len(measured))
    if store is not None:
        extras[measured] = store.aggregate(store.rank(group.prompt.sample.task, values), of_ranked)
    else:
        extras[measured] = values @ np.array(of_ranked, np.float64)
    return extras.tolist()


def _rows(trajectories: Iterable[Trajectory], names: Iterable[str]) -> list[list[float]]:
    """The named metrics of each trajectory that was measured."""
    scores = (one.score for one in trajectories if one.score is not None)
    return [[score.metrics[name] for name in names] for score in scores]
