"""From the components of a step's answers to their rewards: weights, ranks, and the rule for failures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from perception.config import RewardConfig
from perception.types import Score, ScoredGroup
from reward_workers.group_rank import group_ranks
from reward_workers.ranking import RankStore


def make_store(config: RewardConfig) -> RankStore | None:
    """The rank store the preset needs, if it ranks against earlier steps."""
    return RankStore(tuple(config.ranked), config.ecdf) if config.rank == "ecdf" and config.ranked else None


def combine(groups: Sequence[ScoredGroup], config: RewardConfig, store: RankStore | None) -> list[tuple[float, ...]]:
    """Rewards of a step, one tuple per group: weighted components, plus what `rank` makes of the ranked ones.

    `groups` in prompt order. The step's values are appended to `store` but not flushed: call `store.flush()` once the
    step is done. A trajectory without metrics gets 0 and keeps its failure, by which the advantages leave it out where
    the infrastructure failed.
    """
    rewards = [_group_rewards(group, config, store) for group in groups]
    if store is not None:
        for group in groups:
            rows = [_row(score, store.names) for score in group.scores if _is_evidence(score, config)]
            if rows:
                store.append(group.group.prompt.sample.task, np.array(rows))
    return rewards


def _group_rewards(group: ScoredGroup, config: RewardConfig, store: RankStore | None) -> tuple[float, ...]:
    extras = _by_group(group, config) if config.rank == "group" else _by_component(group, config, store)
    return tuple(_reward(score, config, extra) for score, extra in zip(group.scores, extras, strict=True))


def _by_group(group: ScoredGroup, config: RewardConfig) -> list[float]:
    """The one soft rank, which has the weights of all ranked components together, or 1 where none are named."""
    weight = sum(map(_weight, config.ranked.values())) if config.ranked else 1.0
    return [weight * rank for rank in group_ranks(group, config.group, failed=config.unparsed_reward is None)]


def _by_component(group: ScoredGroup, config: RewardConfig, store: RankStore | None) -> list[float]:
    """Weighted quantiles of the ranked components, or their weighted values where there is no store; 0 unmeasured."""
    measured = np.array([bool(score.metrics) for score in group.scores])
    rows = [_row(score, tuple(config.ranked)) for score in group.scores if score.metrics]
    values = np.array(rows, np.float64).reshape(len(rows), len(config.ranked))
    weights = tuple(map(_weight, config.ranked.values()))
    extras = np.zeros(len(measured))
    if store is not None:
        extras[measured] = store.aggregate(store.rank(group.group.prompt.sample.task, values), weights)
    else:
        extras[measured] = values @ np.array(weights, np.float64)
    return extras.tolist()


def _reward(score: Score, config: RewardConfig, ranked: float) -> float:
    if not score.metrics:
        return 0.0
    if score.failure is not None and config.unparsed_reward is not None:
        return config.unparsed_reward
    return ranked + sum(_weight(one) * score.metrics[name] for name, one in config.components.items())


def _is_evidence(score: Score, config: RewardConfig) -> bool:
    return bool(score.metrics) and not (config.ecdf.exclude_unparsed and score.failure is not None)


def _row(score: Score, names: Sequence[str]) -> list[float]:
    return [score.metrics[name] for name in names]


def _weight(component: float | dict[str, float]) -> float:
    return component["weight"] if isinstance(component, dict) else component
