"""Distribution-Ranked Reward (Dr. Seg): a raw metric becomes its quantile in the recent distribution.

Batch-synchronous and deterministic: a step is ranked against earlier steps only, and `append` takes the step's values
in prompt order, whatever the order they arrived in. `flush` ends the step.

    q_j = #{s in queue_j : s <= x_j} / len(queue_j)         ties = "le", the published rule
    q_j = (#{s < x_j} + #{s <= x_j}) / (2 len(queue_j))     ties = "mid"

Source: Dr. Seg's `drr_module/serve.py`, which compares in float32, rounds as Python does and adds the three q_j up
(`aggregate="sum"`); the paper writes their mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from perception.config import EcdfConfig

_ALL_TASKS = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStoreState:
    """The rank store as a checkpoint keeps it."""

    names: tuple[str, ...]
    rows: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Per task: (rows, components) float64, oldest first."""
    steps: Mapping[str, int] = field(default_factory=dict)
    """Per task: training steps that have been flushed into it."""


@dataclass(frozen=True, slots=True)
class _Queue:
    """The recent rollouts of a task, as they stood at the end of a step."""

    rows: np.ndarray
    """(rows, components) float32, oldest first."""
    steps: int
    """Training steps that have been flushed into it."""
    columns: np.ndarray
    """(components, rows): each component's values, sorted."""
    quantiles: np.ndarray
    """Quantile of every count. A table, for Python's round(0.15, 1) is 0.1 and numpy's is 0.2."""


class RankStore:
    """FIFO queues of metric vectors, one per task (or one for all), against which a step is ranked."""

    def __init__(self, names: Sequence[str], config: EcdfConfig) -> None:
        self.names, self.config = tuple(names), config
        zeros = np.zeros((min(config.initial_zero_rows, config.capacity), len(self.names)), np.float32)
        self._initial = self._made(zeros, steps=0)
        self._queues: dict[str, _Queue] = {}
        self._pending: dict[str, list[np.ndarray]] = {}

    def rank(self, task: str, values: np.ndarray) -> np.ndarray:
        """Quantiles (n, k) in 0..1 of values (n, k) in the queue of this task.

        While fewer than `warmup` steps have been flushed, or the queue is empty, the raw values are returned.
        """
        values = self._checked(values)
        queue = self._queues.get(self._name(task), self._initial)
        if queue.steps < self.config.warmup or not len(queue.rows):
            return values.astype(np.float64)
        ranks = np.empty(values.shape)
        for column, sample in enumerate(queue.columns):
            counts = np.searchsorted(sample, values[:, column], side="right")
            if self.config.ties == "mid":
                counts += np.searchsorted(sample, values[:, column], side="left")
            ranks[:, column] = queue.quantiles[counts]
        return ranks

    def aggregate(self, ranks: np.ndarray, weights: Sequence[float]) -> np.ndarray:
        """Weighted sum or mean over the components: (n, k) -> (n,)."""
        total = ranks @ np.asarray(weights, np.float64)
        return total / len(self.names) if self.config.aggregate == "mean" else total

    def append(self, task: str, values: np.ndarray) -> None:
        """Keep values (n, k) for the next flush; call in prompt order."""
        self._pending.setdefault(self._name(task), []).append(self._checked(values).copy())

    def flush(self) -> None:
        """End the step: its values join the queues, the oldest beyond `capacity` leave."""
        for name, pending in self._pending.items():
            queue = self._queues.get(name, self._initial)
            rows = np.concatenate([queue.rows, *pending])[-self.config.capacity :]
            self._queues[name] = self._made(rows.copy(), queue.steps + 1)  # a view would keep the rows that leave
        self._pending.clear()

    def state(self) -> RankStoreState:
        """Everything a checkpoint needs. Raises RuntimeError in the middle of a step."""
        if self._pending:
            raise RuntimeError("the rank store holds an unfinished step: flush it before a checkpoint")
        rows = {name: queue.rows.astype(np.float64) for name, queue in self._queues.items()}
        steps = {name: queue.steps for name, queue in self._queues.items()}
        return RankStoreState(names=self.names, rows=rows, steps=steps)

    def restore(self, state: RankStoreState) -> None:
        """Continue from a checkpoint. Raises ValueError if it ranked other components."""
        if state.names != self.names:
            raise ValueError(f"the checkpoint ranks {list(state.names)}, this run ranks {list(self.names)}")
        newest = {name: np.array(rows[-self.config.capacity :], np.float32) for name, rows in state.rows.items()}
        self._queues = {name: self._made(rows, state.steps[name]) for name, rows in newest.items()}
        self._pending = {}

    def _name(self, task: str) -> str:
        return task if self.config.per_task else _ALL_TASKS

    def _made(self, rows: np.ndarray, steps: int) -> _Queue:
        top = len(rows) * (2 if self.config.ties == "mid" else 1)
        quantiles = [count / top for count in range(top + 1)] if top else []
        if self.config.digits is not None:
            quantiles = [round(quantile, self.config.digits) for quantile in quantiles]
        return _Queue(rows, steps, np.sort(rows.T, axis=1), np.array(quantiles))

    def _checked(self, values: np.ndarray) -> np.ndarray:
        values = np.asarray(values, np.float32)
        if values.ndim != 2 or values.shape[1] != len(self.names):
            raise ValueError(f"expected values of shape (n, {len(self.names)}), got {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError("a value to be ranked is not finite")
        return values
