"""Dr. Seg's and VisionReasoner's tasks: the grammar of `segment`, `ground` and `count`, their own normalised questions.

Source: `problem.lower().strip(".")` in both systems' `verl/utils/rl_dataset.py`.
"""

from perception.tasks import task
from perception.tasks.count import Count
from perception.tasks.ground import Ground
from perception.tasks.segment import Segment
from perception.types import Sample


class Normalised:
    """Questions in lower case, without full stops at their ends."""

    def question(self, sample: Sample) -> str:
        return sample.question.lower().strip(".")


@task("dr_seg")
class DrSeg(Normalised, Segment):
    """Multi-object segmentation, the published task."""


@task("dr_seg_ground")
class DrSegGround(Normalised, Ground): ...


@task("dr_seg_count")
class DrSegCount(Normalised, Count): ...
