"""The parity gate: engine and learner must agree on the first batch's log-probs, or nothing is trained."""

from collections.abc import Sequence

from launch.record.progress import Progress
from launch.run.system import System
from perception import metric_catalog as catalog
from perception.errors import UserError
from perception.types import Group
from rollout.defaults import FP8_PARITY_LIMIT


async def parity_gate(system: System, groups: Sequence[Group], progress: Progress) -> None:
    """Print mean importance ratio and mismatch. Raises UserError beyond `learner.parity_limit`, which is at least
    `FP8_PARITY_LIMIT` with `rollout.quantization`."""
    measured = await system.learner.parity(groups)
    limit, fp8 = system.config.learner.parity_limit, system.config.rollout.quantization
    limit = max(limit, FP8_PARITY_LIMIT) if fp8 else limit
    mismatch, ratio = measured[catalog.LOGPROB_MISMATCH], measured[catalog.RATIO]
    progress.say(
        f"parity: mean importance ratio {ratio:.6f}, mean |log-prob difference| {mismatch:.2e} "
        f"(largest {measured[catalog.LOGPROB_MISMATCH_MAX]:.2e}, limit {limit:g})"
    )
    if not mismatch <= limit:
        raise UserError(
            f"engine and learner disagree: mean |log-prob difference| {mismatch:.3g} > learner.parity_limit={limit:g}. "
            "Usual causes: other weights in the two, another image processor or resize, temperature or token masks "
            "that differ, or a dtype coarser than the limit allows (bfloat16 wants about 0.05)"
        )
