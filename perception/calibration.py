"""Confidence calibration: the expected mask IoU of an answer without its truth, and whether a further look pays.

Confidence features of a candidate -> expected mask IoU, by a logistic model fitted to the candidates whose truth the
reward workers have just seen. The threshold below which an answer is looked at again maximises

    sum over decisions with confidence < threshold of  weight * (gain - cost)

where gain is the mask IoU of the answer kept after the further pass less that of the one kept before it, and cost is
`look.cost`. Confident answers are looked at again only now and then (`look.explore`); such a decision weighs
1 / explore, so that the sum estimates what a higher threshold would have brought. All of this is ours: the published
Look-to-Confirm (Dr. Seg) has one pass.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from perception.config import LookConfig
from perception.types import Candidate, LookState, Trajectory

FEATURES = ("predicted_iou", "stability", "agreement", "certainty", "empty", "later", "withdrawn")
"""predicted_iou   SAM2's own estimate, mean over the answer's objects
stability       area of the mask at logit > 1 over that at logit > -1, mean
agreement       IoU of the answered box and the mask's own box, mean
certainty       mean log-prob of the pass's sampled tokens
empty           1 where the first pass answers that nothing is there
later           1 in every pass but the first
withdrawn       1 where a later pass answers that nothing is there
"""
_RIDGE = 1.0
_BINS = 10
_LEAST = 64
"""Answers of known mask IoU that the first fit needs."""


def confidence(weights: Sequence[float], features: np.ndarray) -> np.ndarray:
    """Expected mask IoU (n,) of candidates with `features` (n, FEATURES), by `LookState.weights`.

    Without weights, while nothing has been learned, SAM2's own estimate.
    """
    if not len(weights):
        return np.clip(features[:, 0], 0.0, 1.0)
    array = np.array(weights)
    return np.asarray(expit(features @ array[1:] + array[0]))


def most_confident(candidates: Sequence[Candidate]) -> int:
    """Index of the candidate to keep; the later one where two are equal. One that did not parse is the last choice."""
    order = [(one.answer.failure is None, one.confidence, place) for place, one in enumerate(candidates)]
    return max(order)[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratorState:
    """The calibrator as a checkpoint keeps it."""

    look: LookState
    judged: np.ndarray
    """(rows, features + 1) float64: features and true mask IoU of past answers, oldest first."""
    decisions: np.ndarray
    """(rows, features + 2) float64: features of an answer that was looked at again, the gain, its weight."""


class Calibrator:
    """Learns from whole steps in prompt order, whatever the order of arrival; frozen unless `learn` is called."""

    def __init__(self, config: LookConfig) -> None:
        self._config = config
        self.state = LookState(weights=(), threshold=1.0, explore=config.explore)
        self._judged = np.zeros((0, len(FEATURES) + 1))
        self._decisions = np.zeros((0, len(FEATURES) + 2))

    @property
    def fitted(self) -> bool:
        return bool(self.state.weights)

    def learn(self, trajectories: Iterable[Trajectory]) -> None:
        """Take a step's judged candidates, fit the calibration anew and choose the threshold for the next step."""
        passes = [one.score.candidates for one in trajectories if one.score is not None]
        judged = [(*one.features, one.mask_iou) for own in passes for one in own if one.mask_iou is not None]
        decisions = [row for own in passes for row in self._decided(own)]
        self._judged = _newest(self._judged, judged, self._config.window)
        self._decisions = _newest(self._decisions, decisions, self._config.window)
        if len(self._judged) < _LEAST:
            return
        weights, threshold = tuple(fit(self._judged[:, :-1], self._judged[:, -1]).tolist()), 1.0
        if len(self._decisions):
            sure = confidence(weights, self._decisions[:, :-2])
            threshold = best_threshold(sure, self._decisions[:, -2], self._decisions[:, -1], self._config.cost)
        self.state = LookState(weights=weights, threshold=threshold, explore=self._config.explore)

    def export(self) -> CalibratorState:
        return CalibratorState(look=self.state, judged=self._judged, decisions=self._decisions)

    def restore(self, saved: CalibratorState) -> None:
        """Raises ValueError where the checkpoint knows other features."""
        if (saved.judged.shape[1], saved.decisions.shape[1]) != (len(FEATURES) + 1, len(FEATURES) + 2):
            raise ValueError(f"the checkpoint's calibration has other features than {', '.join(FEATURES)}")
        self.state, self._judged, self._decisions = saved.look, saved.judged, saved.decisions

    def _decided(self, candidates: Sequence[Candidate]) -> list[tuple[float, ...]]:
        """One row per further pass taken: features of the answer it was decided on, the gain, its weight."""
        rows = []
        by_confidence = self.fitted and self._config.trigger == "confidence" and self.state.explore > 0
        for place, before in enumerate(candidates[:-1]):
            kept = candidates[most_confident(candidates[: place + 1])].mask_iou
            then = candidates[most_confident(candidates[: place + 2])].mask_iou
            if kept is None or then is None:
                continue
            explored = by_confidence and before.confidence >= self.state.threshold
            rows.append((*before.features, then - kept, 1 / self.state.explore if explored else 1.0))
        return rows


def fit(features: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Logistic regression of soft labels: features (n, k), truth (n,) in 0..1 -> (1 + k,), the bias first.

    Cross-entropy plus half the squared weights (bias free); convex, so the result does not depend on the start.
    """
    design = np.column_stack([np.ones(len(features)), features])

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = design @ weights
        free = np.concatenate([[0.0], weights[1:]])
        value = np.logaddexp(0, logits).sum() - truth @ logits + _RIDGE * free @ free / 2
        return float(value), design.T @ (expit(logits) - truth) + _RIDGE * free

    return np.asarray(minimize(loss, np.zeros(design.shape[1]), jac=True, method="L-BFGS-B").x)


def best_threshold(sure: np.ndarray, gains: np.ndarray, weights: np.ndarray, cost: float) -> float:
    """The threshold of the greatest total weighted gain less cost; 0 where no further look pays, 1 where all do.

    Arrays (n,), one entry per decision; `sure` is the confidence it was taken at.
    """
    order = np.argsort(sure, kind="stable")
    total = np.concatenate([[0.0], np.cumsum((weights * (gains - cost))[order])])
    edges = np.concatenate([[0.0], (sure[order][1:] + sure[order][:-1]) / 2, [1.0]])
    # Equal confidences are not told apart, and one of 1 lies below no threshold.
    distinct = np.concatenate([[True], np.diff(sure[order]) > 0, [sure.max() < 1]])
    return float(edges[np.argmax(np.where(distinct, total, -np.inf))])


def calibration_error(sure: np.ndarray, truth: np.ndarray) -> float:
    """Expected calibration error: |mean expected - mean true IoU| over ten equal bins, weighted by their size."""
    bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    gaps = [abs(float((sure[bins == b] - truth[bins == b]).sum())) for b in range(_BINS)]
    return sum(gaps) / len(sure) if len(sure) else 0.0


def _newest(rows: np.ndarray, more: Sequence[tuple[float, ...]], window: int) -> np.ndarray:
    return np.concatenate([rows, np.array(more).reshape(-1, rows.shape[1])])[-window:]
