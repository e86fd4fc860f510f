"""Components about the number of answered objects. A completion without an answer is worth 0."""

from perception import metrics
from reward_workers.components import Case, component


@component(needs={"count"})
def count_exact(case: Case) -> float:
    """1 iff as many objects were answered as there are."""
    return float(case.answered and len(case.answer.objects) == case.target.count)


@component(needs={"count"})
def count_ratio(case: Case) -> float:
    """min / max of the answered and the true count; 1 when both are 0 (Dr. Seg's x2, Perception-R1's counting)."""
    return metrics.count_ratio(len(case.answer.objects), case.target.count) if case.answered else 0.0
