"""Types that cross a process: from data set to prompt, rollout, score, reward, learner and weight sync.

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
Rect = tuple[int, int, int, int]  # left, top, right, bottom in whole pixels; the last two exclusive
Truth = Literal["boxes", "points", "masks", "labels", "count", "text"]  # a part of the truth that a measure may need


class FailureKind(StrEnum):
    """Why a trajectory or a score is not to be trusted."""

    UNPARSED = "unparsed"  # the completion holds no answer in the task's grammar
    TRUNCATED = "truncated"  # the token limit came before the end of the answer
    EMPTY = "empty"  # the engine returned no token
    ENGINE = "engine"  # the engine raised or died
    SCORER = "scorer"  # the reward worker raised or timed out


INFRASTRUCTURE = frozenset({FailureKind.ENGINE, FailureKind.SCORER})  # no evidence about the policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    kind: FailureKind
    detail: str  # one line a person can act on


@dataclass(frozen=True, slots=True, kw_only=True)
class Rle:
    height: int
    width: int
    counts: bytes  # COCO's compressed run-length encoding


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageHandle:
    """An image by content. Pixels travel once: `ref` leads to the encoded bytes."""

    key: str  # hex digest of the encoded bytes (`perception.images.content_key`)
    height: int
    width: int
    ref: Any  # `bytes` of the encoded file, a Ray ObjectRef to them, or the `ImageSource` that holds them


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSource:
    """Where an encoded image lies. It is read where it is needed (`perception.images.read`), never sent about.

    ImageSource(path="street.jpg")                                a file
    ImageSource(path="ReasonSeg_val", split="test", row=17)       a cell of a parquet file, `datasets` folder or hub id
    ImageSource(path="labels.json: line 3", data=b"...")          bytes that stood in the annotations
    """

    path: str
    split: str = ""
    row: int | None = None
    column: str = "image"
    data: bytes | None = None

    def __str__(self) -> str:
        """Names it in messages."""
        return self.path if self.row is None else f"{self.path}, row {self.row}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The truth about one question, as far as the data set gives it. `G` objects; G = 0 is a 'no target' question.

    A count alone: boxes (0, 4), points (0, 2), number=5. A text alone: no objects, complete=False, text="...".
    """

    boxes: np.ndarray  # (G, 4) float32, or (0, 4) where they are unknown
    points: np.ndarray  # (G, 2) float32, one inside each object, or (0, 2)
    masks: tuple[Rle, ...] = ()  # G masks, or () where the data set has none
    labels: tuple[str, ...] = ()
    number: int | None = None  # G where no object is given, but how many there are
    complete: bool = True  # False: there may be more objects than are given (a crowd, a text alone)
    text: str | None = None  # what is to be read
    ignore: Rle | None = None  # pixels judged neither way: void, crowds, regions that the annotators doubted

    @property
    def count(self) -> int:
        given = max(len(self.boxes), len(self.points), len(self.masks))
        return given if self.number is None else self.number

    @property
    def known(self) -> frozenset[Truth]:
        """Parts of the truth that the data set gives."""
        sizes: dict[Truth, int] = {"boxes": len(self.boxes), "points": len(self.points)}
        sizes |= {"masks": len(self.masks), "labels": len(self.labels)}
        whole = {part for part, size in sizes.items() if size == self.count and (size or self.complete)}
        others: dict[Truth, bool] = {"count": self.complete, "text": self.text is not None}
        return frozenset(whole | {part for part, known in others.items() if known})


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One question about one image, read and checked."""

    id: str  # unique inside its data set, stable across runs; named in every message about it
    image: ImageSource
    height: int
    width: int
    question: str
    task: str  # an entry of the settings' `task`, as segment, ground, count
    target: Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A sample made ready for one policy: templated, tokenised (unexpanded), image attached."""

    sample: Sample
    task: str  # registered task (`perception.tasks`) that reads the answers
    token_ids: tuple[int, ...]  # unexpanded: exactly one image placeholder id per entry of `images`
    images: tuple[ImageHandle, ...]
    answer_height: int  # of the frame the policy answers in: the resized image, or 1000
    answer_width: int
    seed: int  # of the group's sampling; derived from (run seed, epoch, sample)


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Tokens [start, end) of a turn were sampled by policy `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The part of the original image that a later pass of Look-to-Confirm is shown, enlarged."""

    left: int  # original pixels
    top: int
    right: int  # exclusive
    bottom: int
    height: int  # of the frame in which the policy answers about the view
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Input ids that were fed and the ids then sampled. The first turn's input is the prompt itself."""

    input_ids: tuple[int, ...]  # unexpanded, fed since the previous turn
    images: tuple[ImageHandle, ...]  # those whose placeholders stand in `input_ids`, in order
    token_ids: tuple[int, ...]  # sampled, the end-of-turn id included when it was
    logprobs: tuple[float, ...]  # log pi(token) as sampled: temperature and banned ids applied
    versions: tuple[VersionSpan, ...]
    text: str  # what the prompt opened and `token_ids` decoded, end of turn and padding left out; only ever parsed
    finish_reason: str
    view: View | None = None  # shown by the last image of `images`; None: the whole image, as in every first turn
    expanded_ids: tuple[int, ...] = ()  # `input_ids` as the engine expanded them; (): no engine has
    prompt_tokens: int = 0  # tokens of the dialogue before `token_ids`, image tokens included
    prefix_tokens: int = 0  # in a later turn: tokens of the dialogue before its `input_ids`,
    prefix_cached: int = 0  # and how many of these the engine still had in its prefix cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """Input of the next turn of a dialogue; the first turn's input is the prompt."""

    input_ids: tuple[int, ...]  # unexpanded, after the previous turn's end-of-turn id
    images: tuple[ImageHandle, ...]
    view: View | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSpec:
    n: int  # answers of a group
    temperature: float  # 0 is greedy and takes n = 1
    max_new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """Facts about the policy that engine and learner must agree on; read once by the controller."""

    path: str  # directory in Hugging Face format
    dtype: str  # float32 or bfloat16
    image_token_id: int  # stands for one image in an UNEXPANDED prompt; its family knows what it expands to
    eos_token_ids: tuple[int, ...]
    banned_token_ids: tuple[int, ...]  # stand for images: never sampled, and masked in the learner's softmax too
    pixels: tuple[int, int] | None = None  # the fewest and the most of a resized image; None: the processor's own
    opened: str = ""  # what the chat format itself writes of an answer, as "<think>\n"
    renames: tuple[tuple[str, str], ...] = ()  # beginnings of parameter names -> the engine's (`perception.families`)


BANNED_LOGIT = -1e9
"""Added to a banned id's logit by the engine, put in its place by the learner: probability 0 in float32, never NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerObject:
    box: Box | None = None
    point: Point | None = None
    label: str | None = None
    further: tuple[Point, ...] = ()  # points of it beside `point`: prompts for the segmenter alone
    background: tuple[Point, ...] = ()  # points beside the object: what it is not


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskPrompt:
    """A box, points, or both, from which the segmenter draws one mask; in the answer's frame."""

    box: Box | None = None
    points: tuple[Point, ...] = ()
    labels: tuple[int, ...] | None = None  # per point 1 (foreground) or 0 (background); None: all are foreground


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A parsed completion. Coordinates are in the frame the parser was asked for."""

    objects: tuple[AnswerObject, ...]
    failure: Failure | None = None  # UNPARSED when no answer could be read; `objects` is then empty
    text: str = ""  # what was read from the image, where that is asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class LookState:
    """The calibration and the threshold of Look-to-Confirm, as learned so far (`perception.calibration`)."""

    weights: tuple[float, ...]  # logistic: the bias, then one per feature; () while nothing has been learned
    threshold: float  # an answer of lower confidence is looked at again
    explore: float  # share of the other answers that are looked at again all the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """How far an answer can be believed without any truth, and the closer view of it where one is due."""

    confidence: float  # expected mask IoU, 0..1
    view: Rect | None = None  # in original pixels; None: no further look
    picture: bytes = b""  # the view, encoded, of `views.picture_size`, the provisional mask outlined
    failure: Failure | None = None  # of the reward worker: there is no finding


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """The answer of one pass of a trajectory, and its measures."""

    answer: Answer  # in original pixels
    features: tuple[float, ...]  # by which its confidence is estimated (`perception.calibration.FEATURES`)
    confidence: float  # expected mask IoU, 0..1
    mask_iou: float | None = None  # with the union of the true masks; 0 if unparsed, None if masks were not compared
    mask_dice: float | None = None  # likewise
    mask: Rle | None = None  # for pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Measures of one trajectory by a reward worker, before any ranking."""

    metrics: Mapping[str, float]  # raw component values by name (`reward_workers.components`), finite
    candidates: tuple[Candidate, ...]  # one per pass, at least one
    kept: int = 0  # index of the most confident candidate: the trajectory's answer, to which the metrics belong

    @property
    def best(self) -> Candidate:
        return self.candidates[self.kept]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One sampled answer, filled field by field, from top to bottom.

    The engine gives turns; the reward worker the score; the controller kl (with `algorithm.kl_in=reward`), reward and
    advantage. A failure comes from the engine, from an answer that did not parse, or from the reward worker.
    """

    index: int  # position inside the group, 0 .. n-1
    turns: tuple[Turn, ...]
    failure: Failure | None = None  # the first thing that went wrong, in whatever stage
    score: Score | None = None  # None before scoring, and for good where engine or reward worker failed
    kl: float | None = None  # to the starting policy, summed over the sampled tokens, in nats
    reward: float | None = None  # less `kl_coef` * `kl` where that is given; None where there is no score
    advantage: float = 0.0  # 0 contributes nothing to the policy's gradient

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

    @property
    def learnable(self) -> bool:
        """Holds sampled tokens that say something of the policy."""
        return self.sampled_tokens > 0 and not self.excluded


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    began: float  # seconds of the controller's monotonic clock
    ended: float


Work = tuple[str, str, float, float]
"""Who was busy with what, without a gap, from when to when: ("rollout engine 0", "generate", ...), as a Span."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The n trajectories of one prompt: the unit of everything downstream."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    sampling: Span | None = None  # of its trajectories, further looks included
    cached: bool = False  # the image's SAM2 embedding was already there when the group was scored

    @property
    def teaches(self) -> bool:
        return any(trajectory.advantage for trajectory in self.trajectories)


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerReport:
    """One optimizer step (or one forward pass), averaged over ranks."""

    metrics: Mapping[str, float]
    seconds: float
