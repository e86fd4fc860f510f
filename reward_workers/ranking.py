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
class _Snapshot:
    """What a step is ranked against."""

    columns: np.ndarray
    """(components, rows) sorted."""
    quantiles: np.ndarray
    """Quantile of every count. A table, for Python's round(0.15, 1) is 0.1 and numpy's is 0.2."""


class RankStore:
    """FIFO queues of metric vectors, one per task (or one for all), and their sorted snapshots."""

    def __init__(self, names: Sequence[str], config: EcdfConfig) -> None:
        self.names, self.config = tuple(names), config
        self._zeros = np.zeros((min(config.initial_zero_rows, config.capacity), len(self.names)), np.float32)
        self._initial = self._snapshot(self._zeros)
        self._rows: dict[str, np.ndarray] = {}
        self._snapshots: dict[str, _Snapshot] = {}
        self._pending: dict[str, list[np.ndarray]] = {}
        self._steps: dict[str, int] = {}

    def rank(self, task: str, values: np.ndarray) -> np.ndarray:
        """Quantiles (n, k) in 0..1 of values (n, k) in the snapshot of this task.

        While fewer than `warmup` steps have been flushed, or the snapshot is empty, the raw values are returned.
        """
        values = self._checked(values)
        queue = self._queue(task)
        snapshot = self._snapshots.get(queue, self._initial)
        if self._steps.get(queue, 0) < self.config.warmup or not snapshot.columns.size:
            return values.astype(np.float64)
        ranks = np.empty(values.shape)
        for column, sample in enumerate(snapshot.columns):
            counts = np.searchsorted(sample, values[:, column], side="right")
            if self.config.ties == "mid":
                counts += np.searchsorted(sample, values[:, column], side="left")
            ranks[:, column] = snapshot.quantiles[counts]
        return ranks

    def aggregate(self, ranks: np.ndarray, weights: Sequence[float]) -> np.ndarray:
        """Weighted sum or mean over the components: (n, k) -> (n,)."""
        total = ranks @ np.asarray(weights, np.float64)
        return total / len(self.names) if self.config.aggregate == "mean" else total

    def append(self, task: str, values: np.ndarray) -> None:
        """Keep values (n, k) for the next flush; call in prompt order."""
        self._pending.setdefault(self._queue(task), []).append(self._checked(values).copy())

    def flush(self) -> None:
        """End the step: its values join the queues, the oldest beyond `capacity` leave."""
        for queue, pending in self._pending.items():
            rows = np.concatenate([self._rows.get(queue, self._zeros), *pending])
            rows = rows[-self.config.capacity :].copy()  # a view would hold on to the rows that leave
            self._rows[queue] = rows
            self._snapshots[queue] = self._snapshot(rows)
            self._steps[queue] = self._steps.get(queue, 0) + 1
        self._pending.clear()

    def state(self) -> RankStoreState:
        """Everything a checkpoint needs. Raises RuntimeError in the middle of a step."""
        if self._pending:
            raise RuntimeError("the rank store holds an unfinished step: flush it before a checkpoint")
        return RankStoreState(
            names=self.names,
            rows={queue: rows.astype(np.float64) for queue, rows in self._rows.items()},
            steps=dict(self._steps),
        )

    def restore(self, state: RankStoreState) -> None:
        """Continue from a checkpoint. Raises ValueError if it ranked other components."""
        if state.names != self.names:
            raise ValueError(f"the checkpoint ranks {list(state.names)}, this run ranks {list(self.names)}")
        self._rows = {queue: np.array(rows[-self.config.capacity :], np.float32) for queue, rows in state.rows.items()}
        self._snapshots = {queue: self._snapshot(rows) for queue, rows in self._rows.items()}
        self._steps = dict(state.steps)
        self._pending = {}

    def _queue(self, task: str) -> str:
        return task if self.config.per_task else _ALL_TASKS

    def _snapshot(self, rows: np.ndarray) -> _Snapshot:
        top = len(rows) * (2 if self.config.ties == "mid" else 1)
        quantiles = [count / top for count in range(top + 1)] if top else []
        if self.config.digits is not None:
            quantiles = [round(quantile, self.config.digits) for quantile in quantiles]
        return _Snapshot(np.sort(rows.T, axis=1), np.array(quantiles))

    def _checked(self, values: np.ndarray) -> np.ndarray:
        values = np.asarray(values, np.float32)
        if values.ndim != 2 or values.shape[1] != len(self.names):
            raise ValueError(f"expected values of shape (n, {len(self.names)}), got {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError("a value to be ranked is not finite")
        return values
