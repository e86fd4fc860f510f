"""Everything that crosses a process, in one file.

Conventions, everywhere in the project:
  boxes   (N, 4) float32, x1 y1 x2 y2, in pixels of the ORIGINAL image unless a name says otherwise
  points  (N, 2) float32, x y, same frame
  masks   COCO run-length encoding of an (H, W) binary mask at the original size
  tokens  tuple[int, ...]; prompts are kept UNEXPANDED: one placeholder id per image
A failure is a value (`Failure`), never a silent zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import numpy as np

Box = tuple[float, float, float, float]
Point = tuple[float, float]
Rect = tuple[int, int, int, int]
"""left, top, right, bottom in whole pixels; the last two exclusive."""


class FailureKind(StrEnum):
    """Why a trajectory or a score is not to be trusted."""

    UNPARSED = "unparsed"  # the completion holds no answer in the task's grammar
    TRUNCATED = "truncated"  # the token limit came before the end of the answer
    EMPTY = "empty"  # the engine returned no token
    ENGINE = "engine"  # the engine raised or died
    SCORER = "scorer"  # the reward worker raised or timed out


INFRASTRUCTURE = frozenset({FailureKind.ENGINE, FailureKind.SCORER})
"""Failures that say nothing about the policy: their rewards are no evidence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    kind: FailureKind
    detail: str
    """One line a person can act on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rle:
    """COCO compressed run-length encoding."""

    height: int
    width: int
    counts: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageHandle:
    """An image by content. Pixels travel once: `ref` leads to the encoded bytes."""

    key: str
    """Hex digest of the encoded bytes (`perception.images.content_key`)."""
    height: int
    width: int
    ref: Any
    """`bytes` of the encoded file, or a Ray ObjectRef to them."""


Truth = Literal["boxes", "points", "masks", "count"]
"""A part of the truth that a measure may need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The truth about one question. `G` objects; G = 0 is a valid 'no target' question."""

    boxes: np.ndarray
    """(G, 4) float32, original pixels, x1 y1 x2 y2."""
    points: np.ndarray
    """(G, 2) float32, original pixels, one point inside each object."""
    masks: tuple[Rle, ...] = ()
    """G masks, or () where the data set has none."""
    labels: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return len(self.boxes)

    @property
    def known(self) -> frozenset[Truth]:
        """What the data set says about the question."""
        masks: frozenset[Truth] = frozenset({"masks"}) if len(self.masks) == self.count else frozenset()
        return masks | {"boxes", "points", "count"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One question about one image, as a data set reader yields it."""

    id: str
    """Unique inside its data set, stable across runs; named in every message about it."""
    image_path: str
    height: int
    width: int
    question: str
    task: str
    """What is asked for: an entry of the settings' `task`, as segment, ground, count."""
    target: Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A sample made ready for one policy: templated, tokenised (unexpanded), image attached."""

    sample: Sample
    task: str
    """Registered task (`perception.tasks`) that reads the answers."""
    token_ids: tuple[int, ...]
    """Unexpanded: exactly one image placeholder id per entry of `images`."""
    images: tuple[ImageHandle, ...]
    answer_height: int
    """Height of the frame the policy answers in (resized image, or 1000)."""
    answer_width: int
    seed: int
    """Seeds the group's sampling; derived from (run seed, epoch, sample)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Tokens [start, end) of a turn were sampled by policy `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The part of the original image that a later pass of Look-to-Confirm is shown, enlarged."""

    left: int
    top: int
    right: int
    """Original pixels, exclusive."""
    bottom: int
    """Original pixels, exclusive."""
    height: int
    """Of the frame in which the policy answers about the view."""
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What was newly fed and what was then sampled. The first turn's input is the prompt itself."""

    input_ids: tuple[int, ...]
    """Unexpanded ids fed since the previous turn."""
    images: tuple[ImageHandle, ...]
    """Images whose placeholders stand in `input_ids`, in order."""
    token_ids: tuple[int, ...]
    """Sampled ids, the end-of-turn id included when it was sampled."""
    logprobs: tuple[float, ...]
    """log pi(token) under the sampling distribution: temperature and banned ids applied."""
    versions: tuple[VersionSpan, ...]
    text: str
    """`token_ids` decoded, without special tokens; only ever parsed, never re-tokenised."""
    finish_reason: str
    view: View | None = None
    """What the last image of `images` shows; None: the whole image, as in every first turn."""
    prompt_tokens: int = 0
    """Tokens of the dialogue before `token_ids`, image tokens included."""
    prefix_tokens: int = 0
    """In a later turn: those of them that were there before its `input_ids` ..."""
    prefix_cached: int = 0
    """... and how many of them the engine still had in its prefix cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """What the next turn of a dialogue is given; the first turn of all is given the prompt."""

    input_ids: tuple[int, ...]
    """Unexpanded, the ids after the previous turn's end-of-turn id."""
    images: tuple[ImageHandle, ...]
    view: View | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSpec:
    """How a group is sampled. temperature 0 is greedy and takes n = 1."""

    n: int
    temperature: float
    max_new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """What engine and learner must agree on about the policy; read once by the controller."""

    path: str
    """Directory in Hugging Face format."""
    dtype: str
    """float32 or bfloat16."""
    image_token_id: int
    """Stands for one image in an UNEXPANDED prompt; what it expands to is its family's business."""
    eos_token_ids: tuple[int, ...]
    banned_token_ids: tuple[int, ...]
    """Ids that stand for images: never sampled, and masked in the learner's softmax too."""
    renames: tuple[tuple[str, str], ...] = ()
    """Beginnings of `named_parameters()` names -> what the engine loads them by (`perception.families`)."""


BANNED_LOGIT = -1e9
"""What the engine adds to the logit of a banned id, and the learner puts in its place: a probability of exactly 0 in
float32, as under a mask of -inf, and no NaN in the entropy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerObject:
    box: Box | None = None
    point: Point | None = None
    label: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskPrompt:
    """What the segmenter draws one mask from, in the answer's frame: a box, points, or both."""

    box: Box | None = None
    points: tuple[Point, ...] = ()
    labels: tuple[int, ...] | None = None
    """Per point 1 (foreground) or 0 (background); None: all are foreground."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A completion, understood. Coordinates are in the frame the parser was asked for."""

    objects: tuple[AnswerObject, ...]
    failure: Failure | None = None
    """UNPARSED when no answer could be read; `objects` is then empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LookState:
    """When to look again and what to believe, as learned so far (`perception.calibration`)."""

    weights: tuple[float, ...]
    """Of the logistic calibration: the bias, then one per feature. () while nothing has been learned."""
    threshold: float
    """An answer of lower confidence is looked at again."""
    explore: float
    """Share of the other answers that are looked at again all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What the reward pool says of an answer without any truth, and the closer view of it where one is due."""

    confidence: float
    """Expected mask IoU, 0..1."""
    view: Rect | None = None
    """In original pixels; None: no further look."""
    picture: bytes = b""
    """The view as an encoded image of `perception.views.picture_size`, the provisional mask outlined."""
    failure: Failure | None = None
    """Why nothing could be said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What one pass of a trajectory answered and what came of it."""

    answer: Answer
    """In original pixels."""
    features: tuple[float, ...]
    """Confidence features (`perception.calibration.FEATURES`)."""
    confidence: float
    """Expected mask IoU by those features, 0..1."""
    mask_iou: float | None = None
    """With the union of the true masks, 0 for an answer that did not parse; None where masks were not compared."""
    mask_dice: float | None = None
    mask: Rle | None = None
    """For pictures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a reward worker says of one trajectory, before any ranking."""

    metrics: Mapping[str, float]
    """Raw component values by name (`reward_workers.components`) of the kept candidate; finite."""
    candidates: tuple[Candidate, ...]
    """One per pass, at least one."""
    kept: int = 0
    """Index of the most confident candidate: the trajectory's answer."""

    @property
    def best(self) -> Candidate:
        return self.candidates[self.kept]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One sampled answer, filled from left to right: sampled, scored, rewarded, given its advantage.

    sampled     turns, failure
    scored      score; failure where an answer did not parse, or the reward worker failed
    rewarded    kl (with `algorithm.kl_in=reward`), reward
    advantaged  advantage
    """

    index: int
    """Position inside the group, 0 .. n-1."""
    turns: tuple[Turn, ...]
    failure: Failure | None = None
    """The first thing that went wrong, in whatever stage."""
    score: Score | None = None
    """None before scoring, and for good where engine or reward worker failed."""
    kl: float | None = None
    """To the starting policy, summed over the sampled tokens, in nats."""
    reward: float | None = None
    """Less `kl_coef` * `kl` where that is given. None where there is no score."""
    advantage: float = 0.0
    """0 contributes nothing to the policy's gradient."""

    @property
    def text(self) -> str:
        """The last turn's text: the one that holds the final answer."""
        return self.turns[-1].text if self.turns else ""

    @property
    def sampled_tokens(self) -> int:
        return sum(len(turn.token_ids) for turn in self.turns)

    @property
    def excluded(self) -> bool:
        """The infrastructure failed, which says nothing of the policy: no part of baseline, loss or statistics."""
        return self.failure is not None and self.failure.kind in INFRASTRUCTURE


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Seconds of the controller's monotonic clock."""

    began: float
    ended: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The n trajectories of one prompt: the unit of everything downstream."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    sampling: Span | None = None
    """When its trajectories were sampled, further looks included."""
    cached: bool = False
    """The image's SAM2 embedding was already there when the group was scored."""

    @property
    def teaches(self) -> bool:
        return any(trajectory.advantage for trajectory in self.trajectories)


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerReport:
    """One optimizer step (or one forward pass), averaged over ranks."""

    metrics: Mapping[str, float]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlot:
    """Where one parameter lies inside a bucket's flat buffer (see the example of `WeightBucket`)."""

    name: str
    """The policy's `named_parameters()` name."""
    dtype: str
    """e.g. float32, bfloat16."""
    shape: tuple[int, ...]
    offset: int
    """In bytes from the start of the buffer; aligned to 16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBucket:
    """A flat byte buffer of parameters on its way to an engine.

    A float32 bias of 3 (12 bytes) and a bfloat16 matrix of 2 x 2 (8 bytes) are

        slots = (TensorSlot(name="bias", dtype="float32", shape=(3,), offset=0),
                 TensorSlot(name="weight", dtype="bfloat16", shape=(2, 2), offset=16))
        nbytes = 24

    in a buffer whose bytes 12 to 15 nobody reads.
    """

    slots: tuple[TensorSlot, ...]
    nbytes: int
    transport: str
    """As in `perception.config.PlacementConfig`."""
    payload: Any = None
    """store: a (nbytes,) uint8 array, or an ObjectRef to one. ipc: a CUDA IPC handle. nccl, gloo: (host, port, members)
    of the process group in which the learner, member 0, broadcasts the buckets in order."""
    checksum: int | None = None
    """Of these parameters (`runtime.weights`); the first bucket also counts the weights that are never sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    version: str
    """vLLM's version."""
    seconds: float
    """From construction to ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """One sync, as one engine saw it."""

    version: int
    transfer_seconds: float
    """From the first bucket to the pause: bytes on their way while sampling goes on."""
    pause_seconds: float
    """How long nothing was sampled."""
    nbytes: int
    checksum: int | None = None
    """Of all parameters the engine now holds, where it was asked for."""
