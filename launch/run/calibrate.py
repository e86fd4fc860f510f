"""First calibration of a run with `look=relook`, on training questions; the policy must know the second look."""

from collections.abc import Sequence

from launch.run.looking import sampled
from launch.run.system import System
from perception.errors import UserError
from perception.types import Sample

ANSWERS = 4
_SEED_STEP = 1 << 31
"""Neither a training step's seeds nor an evaluation's."""
_LEAST_PARSED = 0.5


async def calibrate(system: System, samples: Sequence[Sample]) -> str:
    """Answer some training questions, looking again wherever there is something to enlarge, and learn from their truth.

    Returns a line to print. Raises UserError where the policy does not answer second looks in the form asked for.
    """
    prompts = system.prompts(samples[: system.config.look.calibration], _SEED_STEP)
    groups = await system.answer(prompts, sampled(ANSWERS, system.config.rollout))
    passes = [one.score.candidates for group in groups for one in group.trajectories if one.score is not None]
    later = [candidate.answer.failure is None for own in passes for candidate in own[1:]]
    if later and sum(later) < _LEAST_PARSED * len(later):
        raise UserError(
            f"look=relook: only {sum(later)} of {len(later)} second looks were answered in a form that parses. "
            f"{system.config.model.path} does not know this turn: train it on such dialogues first "
            "(python -m launch.sft), or use look=none or look=inline"
        )
    system.calibrator.learn(one for group in groups for one in group.trajectories)
    learned = f"calibrated on {len(passes)} answers and {len(later)} second looks"
    return f"look: {learned}; threshold {system.calibrator.state.threshold:.2f}"
