"""Settings of second looks and of the reward."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from perception.config.fields import Fraction, LookMode, Natural, NonNegative, Positive, Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class LookConfig:
    mode: LookMode = "none"
    """none: one pass. inline: Dr. Seg's single pass with `<look>` blocks. relook: again where an answer is unsure."""
    trigger: Literal["confidence", "always", "never"] = "confidence"
    """When relook looks again: below the learned threshold, whenever there is something to enlarge, or never."""
    max_passes: Annotated[int, Ge(2)] = 2
    """Passes of a trajectory, the first one included."""
    margin: NonNegative = 0.5
    """What a view shows around the answer, in longer sides of it."""
    smallest: Annotated[float, Gt(0.0), Le(1.0)] = 0.25
    """Side of the smallest view, as a share of the image's shorter side."""
    min_zoom: Annotated[float, Ge(1.0)] = 1.3
    """A view enlarged by less than this is not worth a pass."""
    pixels: Positive = 12544
    """Pixels of a view's picture."""
    cost: NonNegative = 0.01
    """Mask IoU that a further pass must gain to be worth its time."""
    explore: Fraction = 0.1
    """While training: share of the confident answers looked at again all the same, to measure what that gains."""
    calibration: Natural = 64
    """Training prompts answered before the first step, to learn when to look again; 0: learn only while training."""
    window: Positive = 4096
    """Judged answers the calibration is fitted to, the newest ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EcdfConfig:
    capacity: Positive = 2048
    initial_zero_rows: Natural = 0
    """Rollouts a queue holds, the newest ones, and rows of zeros it starts with."""
    ties: Literal["le", "mid"] = "mid"
    """A rank is the share of lower and equal values (le), or equal ones count half (mid)."""
    digits: Natural | None = None
    """Round each rank to so many decimals; None: no rounding."""
    aggregate: Literal["sum", "mean"] = "sum"
    """Sum or mean of the components' weighted ranks."""
    warmup: Natural = 1
    """Steps that must have been seen before ranks are used; raw values serve until then."""
    exclude_unparsed: bool = True
    """An answer that does not parse does not enter the queue."""
    per_task: bool = True
    """A queue per task, or one for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRankConfig:
    by: Literal["iou", "dice", "ap"] = "iou"
    """Metric of the masks that are compared."""
    temperature: Rate = 0.1
    """Difference of the metric that counts as clearly better; towards 0 the rank becomes a hard one."""


Weights = dict[str, float | dict[str, Any]]  # component name -> weight, or {weight: ..., parameters of the component}


def weights(chosen: Weights) -> dict[str, float]:
    """Component name -> weight, without parameters, of those that count."""
    given = {name: one["weight"] if isinstance(one, dict) else one for name, one in chosen.items()}
    return {name: weight for name, weight in given.items() if weight}


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    name: str
    """The preset's name in messages."""
    components: Weights
    """Added to the reward as they are: component name -> weight, or {weight: 0.3, alpha: 0.5} with its parameters.
    `reward.components={NAME: 1}` replaces the preset's, `reward.components.NAME=1` adds to them, and weight 0 takes one
    away, which is then not even measured."""
    ranked: Weights = field(default_factory=dict)
    """Components that `rank` is about, written the same way."""
    rank: Literal["none", "ecdf", "group"] = "none"
    """`ranked` is added raw, as quantiles of recent rollouts, or replaced by one soft rank of the masks (group)."""
    ecdf: EcdfConfig = EcdfConfig()
    """Distribution-Ranked Reward (Dr. Seg): a metric's quantile among recent ones (`reward_workers/ranking.py`)."""
    group: GroupRankConfig = GroupRankConfig()
    """Soft rank among all candidate masks of a prompt, of every pass and sample (`reward_workers/group_rank.py`)."""
    unparsed_reward: float | None = 0.0
    """Reward of a failed trajectory; null lets its components stand (the published systems' rule)."""
    multimask: bool = False
    """SAM2 proposes three masks and the most confident one is kept."""
    swapped_channels: bool = False
    """SAM2 sees blue as red and red as blue: a bug of Seg-R1's released code."""
    workers: Positive = 1
    image_cache: Positive = 64
    """Reward workers, each with its own SAM2, and the image embeddings each of them keeps."""
    mask_cache: Natural = 512
    """Answers that look=relook has examined whose masks a worker keeps until they are scored; 0: decoded again."""
    timeout_s: Rate = 120.0
    """Longest wait for a group's score."""
    max_failure_rate: Fraction = 0.5
    """Engine or scorer failures above this share of a step stop the run."""
