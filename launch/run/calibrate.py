"""Before a run that looks again: what may be believed of the starting policy, and whether it knows the second look."""

from __future__ import annotations

from collections.abc import Sequence

from launch.run.system import System
from perception.errors import UserError
from perception.types import Sample, SamplingSpec, ScoredGroup

ANSWERS = 4
_SEED_STEP = 1 << 31
"""Neither a training step's seeds nor an evaluation's."""
_LEAST_PARSED = 0.5


async def calibrate(system: System, samples: Sequence[Sample]) -> str:
    """Answer some training questions, looking again wherever there is something to enlarge, and learn from their truth.

    Returns a line to print. Raises UserError where the policy does not answer second looks in the form asked for.
    """
    sampling = SamplingSpec(
        n=ANSWERS,
        temperature=system.config.rollout.temperature,
        max_new_tokens=system.config.rollout.max_new_tokens,
    )
    scored = await system.answer(system.prompts(samples[: system.config.look.calibration], _SEED_STEP), sampling)
    later = _later_parsed(scored)
    if later and sum(later) < _LEAST_PARSED * len(later):
        raise UserError(
            f"look=relook: only {sum(later)} of {len(later)} second looks were answered in a form that parses. "
            f"{system.config.model.path} does not know this turn: train it on such dialogues first "
            "(python -m launch.sft), or use look=none or look=inline"
        )
    system.look.learn([score for entry in scored for score in entry.scores])
    threshold = system.look.state.threshold
    return (
        f"look: calibrated on {len(scored) * ANSWERS} answers and {len(later)} second looks; threshold {threshold:.2f}"
    )


def _later_parsed(scored: Sequence[ScoredGroup]) -> list[bool]:
    candidates = [score.candidates for entry in scored for score in entry.scores]
    return [one.answer.failure is None for passes in candidates for one in passes[1:]]
