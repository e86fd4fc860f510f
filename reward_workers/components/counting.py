"""Components about the number of answered objects. A completion without an answer is worth 0."""

from perception import metrics
from perception.grammar import MAX_OBJECTS
from reward_workers.components import Case, component


def _counts(case: Case) -> tuple[int, int]:
    """Answered and true number of objects, the truth cut at 120 as the answer is."""
    return len(case.answer.objects), min(case.target.count, MAX_OBJECTS)


@component(needs={"count"})
def count_exact(case: Case) -> float:
    """1 iff as many objects were answered as there are."""
    answered, true = _counts(case)
    return float(case.answered and answered == true)


@component(needs={"count"})
def count_ratio(case: Case) -> float:
    """min / max of the answered and the true count; 1 when both are 0 (Dr. Seg's x2, Perception-R1's counting)."""
    return metrics.count_ratio(*_counts(case)) if case.answered else 0.0
