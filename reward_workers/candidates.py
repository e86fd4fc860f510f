"""Every pass of every sample of a group as a candidate: how far it can be believed, and how good its mask is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from perception import masks
from perception.calibration import FEATURES, confidence
from perception.types import Answer, Candidate, LookState, Trajectory, Turn

if TYPE_CHECKING:
    from reward_workers.segmenter import Segmentation

_UNCALIBRATED = LookState(weights=(), threshold=1.0, explore=0.0)


class Judge:
    """Holds a group's segmented answers, in the order of its trajectories and their passes."""

    def __init__(
        self, segmentation: Segmentation | None, truth: np.ndarray | None, look: LookState | None, want_masks: bool
    ) -> None:
        """`truth`: union of the true masks, (H, W) bool, where the answers' masks are to be compared with it."""
        self._segmentation, self._truth, self._want_masks = segmentation, truth, want_masks
        self._look = look or _UNCALIBRATED
        compare = segmentation is not None and truth is not None
        self._overlaps = segmentation.overlaps(truth) if compare else None  # type: ignore[union-attr, arg-type]

    def candidates(self, trajectory: Trajectory, read: Sequence[Answer], first: int) -> tuple[Candidate, ...]:
        """One per pass of a trajectory whose first answer is the group's answer number `first`."""
        turns = trajectory.turns or (None,)
        return tuple(self._candidate(answer, turns[place], place, first + place) for place, answer in enumerate(read))

    def arrays(self, number: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Answered and true mask, (H, W) bool, on the host."""
        return (self._segmentation.mask(number) if self._segmentation is not None else None), self._truth

    def _candidate(self, answer: Answer, turn: Turn | None, place: int, number: int) -> Candidate:
        segmentation, overlaps = self._segmentation, self._overlaps
        measured = segmentation.features[number] if segmentation is not None else np.zeros(3)
        features = confidence_features(measured, answer, turn, place)
        drawn = segmentation is not None and self._want_masks and bool(answer.objects)
        return Candidate(
            answer=answer,
            features=features,
            confidence=float(confidence(self._look, np.array([features]))[0]),
            mask_iou=float(overlaps[number, 0]) if overlaps is not None else None,
            mask_dice=float(overlaps[number, 1]) if overlaps is not None else None,
            mask=masks.encode(segmentation.mask(number)) if drawn and segmentation is not None else None,
        )


def confidence_features(segmented: np.ndarray, answer: Answer, turn: Turn | None, place: int) -> tuple[float, ...]:
    """`perception.calibration.FEATURES` of one pass; `segmented` are SAM2's three, `place` counts passes from 0."""
    empty = answer.failure is None and not answer.objects
    certainty = float(np.mean(turn.logprobs)) if turn is not None and turn.logprobs else 0.0
    flags = (empty and place == 0, place > 0, empty and place > 0)
    features = (*segmented.tolist(), certainty, *map(float, flags))
    assert len(features) == len(FEATURES)
    return features
