"""Every pass of a group's samples as a candidate: how far it can be believed, and how good its mask is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from perception import masks
from perception.calibration import FEATURES, confidence
from perception.types import Candidate, LookState
from reward_workers.reading import Pass

if TYPE_CHECKING:
    from reward_workers.segmenter import Segmentation

_UNCALIBRATED = LookState(weights=(), threshold=1.0, explore=0.0)


def judge(
    passes: Sequence[Pass],
    segmentation: Segmentation | None,
    truth: np.ndarray | None,
    look: LookState | None,
    want_masks: bool,
) -> list[Candidate]:
    """One candidate per pass, segmented in the same order.

    `truth`: union of the true masks, (H, W) bool, where the answers' masks are to be compared with it.
    """
    segmented = segmentation.features if segmentation is not None else np.zeros((len(passes), 3))
    overlaps = segmentation.overlaps(truth) if segmentation is not None and truth is not None else None
    features = confidence_features(passes, segmented)
    sure = confidence(look or _UNCALIBRATED, features)
    return [
        Candidate(
            answer=one.answer,
            features=tuple(features[i].tolist()),
            confidence=float(sure[i]),
            mask_iou=float(overlaps[i, 0]) if overlaps is not None else None,
            mask_dice=float(overlaps[i, 1]) if overlaps is not None else None,
            mask=masks.encode(segmentation.mask(i)) if segmentation and want_masks and one.answer.objects else None,
        )
        for i, one in enumerate(passes)
    ]


def confidence_features(passes: Sequence[Pass], segmented: np.ndarray) -> np.ndarray:
    """`perception.calibration.FEATURES` of each pass, (n, FEATURES); `segmented` (n, 3) are SAM2's."""
    own = []
    for one in passes:
        empty = one.answer.failure is None and not one.answer.objects
        certainty = float(np.mean(one.turn.logprobs)) if one.turn is not None and one.turn.logprobs else 0.0
        own.append((certainty, empty and one.place == 0, one.place > 0, empty and one.place > 0))
    return np.concatenate([segmented, np.array(own, np.float64).reshape(-1, len(FEATURES) - 3)], axis=1)
