"""The parity gate: engine and learner must agree on the first batch's log-probs, or nothing is trained."""

from collections.abc import Callable, Sequence

from launch.run.system import System
from perception import metric_catalog as catalog
from perception.config import Config
from perception.errors import UserError
from perception.types import Group
from rollout.defaults import FP8_PARITY_LIMIT

LIMITS = {"float32": 0.02, "bfloat16": 0.05, "fp8": FP8_PARITY_LIMIT}
"""Mean |log-prob difference| by the coarser format of the two. Computed in two ways, a random policy in bfloat16
differs by 0.028 at the 3B shape on a GPU; one of 36 layers is 0.027 from float32. Stale weights: 0.7."""


def parity_limit(config: Config) -> float:
    """`learner.parity_limit`, or what suits the formats that engine and learner compute in."""
    return config.learner.parity_limit or LIMITS[config.rollout.quantization or config.model.dtype]


async def parity_gate(system: System, groups: Sequence[Group], say: Callable[[str], None]) -> None:
    """Say mean importance ratio and mismatch. Raises UserError beyond `parity_limit`."""
    measured, limit = await system.learner.parity(groups), parity_limit(system.config)
    mismatch, ratio = measured[catalog.LOGPROB_MISMATCH], measured[catalog.RATIO]
    worst = f"(largest {measured[catalog.LOGPROB_MISMATCH_MAX]:.2e}, limit {limit:g})"
    say(f"parity: mean importance ratio {ratio:.6f}, mean |log-prob difference| {mismatch:.2e} {worst}")
    if not mismatch <= limit:
        found = f"mean |log-prob difference| {mismatch:.3g} > learner.parity_limit={limit:g}. Usual causes"
        causes = "other weights in the two, another image processor or resize, temperature or token masks that differ"
        raise UserError(f"engine and learner disagree: {found}: {causes}, or a limit too small for the dtype")
