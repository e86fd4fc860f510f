"""Component `centre_distance`: how near the answered box's centre is to the true one's."""

from __future__ import annotations

import numpy as np

from reward_workers.components import Case, component


@component(needs={"boxes"})
def centre_distance(case: Case, *, reach: float = 0.5) -> float:
    """1 at the true centre, 0 from `reach` image diagonals on, linear between."""
    if not case.answer.objects or not case.target.count:
        return float(case.answered and not case.answer.objects and not case.target.count)
    answered, true = np.array(case.answer.objects[0].box), case.target.boxes[0]
    off = np.hypot(*((answered[:2] + answered[2:] - true[:2] - true[2:]) / 2))
    return float(max(0.0, 1 - off / (reach * np.hypot(case.image.height, case.image.width))))
