"""Distribution-Ranked Reward inside the group: a soft rank among all candidate masks of the prompt.

The other published form of the method is "a soft reward vector over all candidate masks of the loop (every pass of
every sample of the prompt), by IoU, Dice or AP, temperature configurable". Dr. Seg's code has none of it, so the
definition is our reading of that sentence. For the K candidates of one group, with values m_1 .. m_K:

    q_c = 1/K * sum_k sigmoid((m_c - m_k) / temperature)

the soft fraction of the prompt's masks that candidate c beats. The K ranks always add up to K/2. Towards temperature
0, q_c is the hard middle rank (#{m_k < m_c} + #{m_k <= m_c}) / (2 K); a large temperature makes all ranks 1/2. A
trajectory's rank is the mean over its own candidates: repeating an answer in further passes leaves its lead over the
mean of the others as it was.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import expit

from perception.config import GroupRankConfig
from perception.types import Candidate, Group

AP_THRESHOLDS = np.arange(50, 100, 5) / 100
"""COCO's: 0.50, 0.55, .. 0.95."""


def soft_ranks(values: Sequence[Sequence[float]], temperature: float) -> tuple[float, ...]:
    """One rank in 0..1 per trajectory, from the values of its candidates; 0 for a trajectory without any.

    Raises ValueError for a value that is not finite.
    """
    flat = np.array([value for own in values for value in own], np.float64)
    if not np.isfinite(flat).all():
        raise ValueError("a value to be ranked is not finite")
    with np.errstate(over="ignore"):  # an infinite difference is what a vanishing temperature means
        beaten = expit((flat[:, None] - flat) / temperature)
    ranks = beaten.sum(axis=1) / max(len(flat), 1)
    ends = np.cumsum([len(own) for own in values], dtype=np.int64)
    return tuple(float(own.mean()) if own.size else 0.0 for own in np.split(ranks, ends)[:-1])


def group_ranks(group: Group, config: GroupRankConfig, failed: bool) -> tuple[float, ...]:
    """The soft rank of every trajectory of a group, (n,).

    A trajectory that was not measured takes no part and gets 0; neither does one that failed, unless `failed`: it then
    takes part with whatever candidates it has. A pass without an answer is worth 0, also where there is no target.
    Raises ValueError naming the sample where masks were not compared.
    """
    name = group.prompt.sample.id
    scores = (one.score if failed or one.failure is None else None for one in group.trajectories)
    values = [[_value(one, config, name) for one in (score.candidates if score else ())] for score in scores]
    return soft_ranks(values, config.temperature)


def average_precision(iou: float) -> float:
    """Share of COCO's thresholds that an IoU reaches, 0..1."""
    return float(np.mean(iou >= AP_THRESHOLDS))


def _value(candidate: Candidate, config: GroupRankConfig, name: str) -> float:
    metric = candidate.mask_dice if config.by == "dice" else candidate.mask_iou
    if metric is None:
        why = "its masks were not compared, so reward.rank=group has nothing to rank"
        raise ValueError(f"sample '{name}': {why}; score it with mask_iou, or choose another reward.rank")
    if candidate.answer.failure is not None:
        return 0.0
    return average_precision(metric) if config.by == "ap" else metric
