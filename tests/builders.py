"""Builders of what crosses a process, shared by tests and benchmarks: whole with defaults, and any part of it by name.

    group(trajectory(turn("<answer>[]</answer>")), unparsed())            # scored by nobody yet
    group(measured(0.9, mask_iou=0.9), measured(0.2, mask_iou=0.2))       # scored
    sampled_group(policy, rng, n=4)                                       # random tokens for the learner

Frames are one to one: the policy answers in the image's own pixels unless a prompt says otherwise. Nothing here needs
torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from perception import masks
from perception.calibration import FEATURES, most_confident
from perception.config import (
    AlgorithmConfig,
    Config,
    DataConfig,
    LearnerConfig,
    LookConfig,
    ModelConfig,
    PlacementConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
    WandbConfig,
)
from perception.datasets import Dataset, load
from perception.frames import Frame
from perception.images import content_key
from perception.scenes import SceneObject
from perception.tasks import TASKS
from perception.types import (
    Answer,
    AnswerObject,
    Candidate,
    Failure,
    FailureKind,
    Group,
    ImageHandle,
    ImageSource,
    PolicySpec,
    Prompt,
    Rle,
    Sample,
    Score,
    Target,
    Trajectory,
    Turn,
    VersionSpan,
    View,
)
from reward_workers.components import Case

Box = tuple[float, float, float, float]
SIDE = 112
"""Height and width of an image, in pixels, where nothing else is said."""


# ---------------------------------------------------------------- images, truth, samples, prompts


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def rectangle(x1: int, y1: int, x2: int, y2: int, height: int, width: int) -> np.ndarray:
    """A mask of (height, width) that holds the pixels from (x1, y1) to before (x2, y2)."""
    mask = np.zeros((height, width), bool)
    mask[y1:y2, x1:x2] = True
    return mask


def noise(seed: int | np.random.Generator, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """(height, width, 3) uint8 RGB, every pixel at random."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def image(pixels: np.ndarray) -> ImageHandle:
    """(H, W, 3) uint8 RGB as a handle that holds the bytes of a PNG."""
    return _encoded(pixels[..., ::-1], "png")


def noise_image(
    seed: int | np.random.Generator, height: int = SIDE, width: int = SIDE, form: str = "png"
) -> ImageHandle:
    """Random pixels as a handle that holds their encoded bytes. `form`: png or jpg."""
    return _encoded(noise(seed, height, width), form)


def _encoded(pixels: np.ndarray, form: str) -> ImageHandle:
    """(H, W, 3) uint8 BGR."""
    data = cv2.imencode(f".{form}", pixels)[1].tobytes()
    return ImageHandle(key=content_key(data), height=len(pixels), width=len(pixels[0]), ref=data)


def target(boxes: Any = (), points: Any = None, shapes: Sequence[Rle] = ()) -> Target:
    """The truth: (G, 4) boxes, (G, 2) points (default: the boxes' centres) and G masks, or none. No box: no target."""
    where = np.array(boxes, np.float32).reshape(-1, 4)
    inside = (where[:, :2] + where[:, 2:]) / 2 if points is None else np.array(points, np.float32).reshape(-1, 2)
    return Target(boxes=where, points=inside, masks=tuple(shapes))


def scene_target(objects: Sequence[SceneObject]) -> Target:
    """The truth about these objects of a synthetic scene, masks included."""
    shapes = [masks.encode(one.mask) for one in objects]
    return target([one.box for one in objects], [one.point for one in objects], shapes)


def sample(name: str = "s", truth: Target | None = None, **changes: Any) -> Sample:
    """A question about a square image; `truth` is no target where none is given."""
    plain = Sample(
        id=name,
        image=ImageSource(path=""),
        height=SIDE,
        width=SIDE,
        question="the red circle",
        task="segment",
        target=target() if truth is None else truth,
    )
    return replace(plain, **changes)


def prompt(asked: Sample | None = None, **changes: Any) -> Prompt:
    """A prompt about `asked`, answered in the image's own pixels and read by the task of the sample's name."""
    asked = asked or sample()
    plain = Prompt(
        sample=asked,
        task=asked.task,
        token_ids=(1,),
        images=(),
        answer_height=asked.height,
        answer_width=asked.width,
        seed=0,
    )
    return replace(plain, **changes)


# ---------------------------------------------------------------- answers, scores, trajectories, groups


def turn(text: str = "", token_ids: Sequence[int] = (), version: int = 0, **changes: Any) -> Turn:
    """One pass. Its log-probs are -0.5 each and its tokens of one policy version unless told."""
    count = len(token_ids)
    plain = Turn(
        input_ids=(1,),
        images=(),
        token_ids=tuple(token_ids),
        logprobs=(-0.5,) * count,
        versions=(VersionSpan(version=version, start=0, end=count),) if count else (),
        text=text,
        finish_reason="stop",
    )
    return replace(plain, **changes)


def view(left: int, top: int, right: int, bottom: int, height: int = SIDE, width: int = SIDE) -> View:
    """Part of an image, shown at height x width."""
    return View(left=left, top=top, right=right, bottom=bottom, height=height, width=width)


def failure(kind: FailureKind = FailureKind.UNPARSED, detail: str = "test") -> Failure:
    return Failure(kind=kind, detail=detail)


def answer(*boxes: Box, failed: bool = False) -> Answer:
    """Boxes and nothing else; none: 'nothing is there', or with `failed` an answer that did not parse."""
    return Answer(objects=tuple(AnswerObject(box=box) for box in boxes), failure=failure() if failed else None)


def candidate(iou: float | None = None, sure: float = 0.5, failed: bool = False, **changes: Any) -> Candidate:
    """One pass of a score. Its Dice follows from the IoU; `failed`: the pass did not parse."""
    plain = Candidate(
        answer=answer(failed=failed),
        features=(0.0,) * len(FEATURES),
        confidence=sure,
        mask_iou=iou,
        mask_dice=None if iou is None else 2 * iou / (1 + iou),
    )
    return replace(plain, **changes)


def score(*passes: Candidate, **metrics: float) -> Score:
    """A score of these passes, of which the most confident one is kept; of one plain pass where none is given."""
    passes = passes or (candidate(),)
    return Score(metrics=metrics, candidates=passes, kept=most_confident(passes))


def trajectory(*turns: Turn | str, index: int = 0, **changes: Any) -> Trajectory:
    """A sampled answer; a text stands for a turn of it."""
    made = tuple(turn(one) if isinstance(one, str) else one for one in turns)
    return replace(Trajectory(index=index, turns=made), **changes)


def measured(*passes: Candidate | float, reward: float | None = None, **metrics: float) -> Trajectory:
    """A scored answer that parsed. A number stands for a pass of that mask IoU."""
    made = tuple(one if isinstance(one, Candidate) else candidate(one) for one in passes)
    return trajectory(score=score(*made, **metrics), reward=reward)


def unparsed(*passes: Candidate, reward: float | None = None, **metrics: float) -> Trajectory:
    """A scored answer that did not parse: one pass of mask IoU 0 where none is given."""
    found = score(*(passes or (candidate(0.0, failed=True),)), **metrics)
    return trajectory(failure=failure(), score=found, reward=reward)


def lost(kind: FailureKind = FailureKind.ENGINE, detail: str = "test", **changes: Any) -> Trajectory:
    """What engine or reward worker failed: nothing was measured of it."""
    return trajectory(failure=failure(kind, detail), **changes)


def group(*trajectories: Trajectory, about: Prompt | None = None, **changes: Any) -> Group:
    """One prompt's trajectories, numbered in order."""
    numbered = tuple(replace(one, index=place) for place, one in enumerate(trajectories))
    return replace(Group(prompt=about or prompt(), trajectories=numbered), **changes)


def policy_spec(path: str = "", **changes: Any) -> PolicySpec:
    """A policy whose image placeholder is 300 and whose end of turn is 301, with nothing banned."""
    plain = PolicySpec(path=path, dtype="float32", image_token_id=300, eos_token_ids=(301,), banned_token_ids=())
    return replace(plain, **changes)


def sampled_group(
    policy: PolicySpec,
    rng: np.random.Generator,
    n: int = 4,
    prompt_tokens: int = 12,
    answer_tokens: int = 9,
    images: int = 1,
    turns: int = 1,
    side: int = 56,
    vocabulary: int = 256,
) -> Group:
    """As the rollout would hand it over, with random ids and advantages: one prompt, n answers of 1 .. answer_tokens
    tokens; later turns bring a second image and more text."""

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocabulary, length).tolist())

    first = tuple(noise_image(rng, side, side) for _ in range(images))
    token_ids = ids(3) + (policy.image_token_id, 5) * images + ids(prompt_tokens)
    asked = sample(f"s{rng.integers(1 << 30)}", height=side, width=side, question="")

    def sampled(fed: tuple[int, ...], fed_images: tuple[ImageHandle, ...]) -> Turn:
        said = ids(int(rng.integers(1, answer_tokens + 1)))
        logprobs = tuple(rng.uniform(-7.0, -4.0, len(said)).tolist())
        return turn(token_ids=said, input_ids=fed, images=fed_images, logprobs=logprobs)

    def whole() -> Trajectory:
        later = [
            sampled((*ids(4), policy.image_token_id, *ids(2)), (noise_image(rng, 28, 84),)) for _ in range(turns - 1)
        ]
        return trajectory(sampled(token_ids, first), *later)

    made = group(*(whole() for _ in range(n)), about=prompt(asked, token_ids=token_ids, images=first))
    return with_advantages(made, rng.normal(size=n).tolist())


def with_advantages(one: Group, advantages: Sequence[float]) -> Group:
    """The group with these advantages, one per trajectory."""
    pairs = zip(one.trajectories, advantages, strict=True)
    return replace(one, trajectories=tuple(replace(each, advantage=value) for each, value in pairs))


def case(text: str, truth: Target | None = None, side: int = SIDE, **changes: Any) -> Case:
    """A completion of the task segment beside its truth, about the whole of a square image and in its own pixels."""
    plain: dict[str, Any] = {
        "text": text,
        "answer": TASKS["segment"].parse(text),
        "target": target() if truth is None else truth,
        "image": Frame(side, side),
        "view": view(0, 0, side, side, side, side),
    }
    return Case(**plain | changes)


# ---------------------------------------------------------------- settings, data sets


def dataset(path: Path, form: str = "", **changes: Any) -> Dataset:
    """What is at `path`, read as `form`: by default coco for a .json and jsonl for a .jsonl; `changes` of `data`."""
    kind = form or {".json": "coco"}.get(path.suffix, path.suffix[1:])
    return load(DataConfig(**{"format": kind, "train": str(path), "eval": str(path)} | changes), str(path))


def config(output: Path | str = "runs", name: str = "quickstart", **rooms: Any) -> Config:
    """Settings of a small run on the CPU under `output`; `rooms` replaces whole parts, as learner=LearnerConfig()."""
    plain = Config(
        run=RunConfig(name=name, output=str(output), rollouts_kept=4),
        model=ModelConfig(path="assets/policy", segmenter="assets/segmenter"),
        data=DataConfig(format="coco", train="data/train.json", eval="data/eval.json"),
        task={
            "segment": TaskConfig(
                system="You see.", template="Find {question}.", inline="Look for {question}.", again="Closer."
            )
        },
        look=LookConfig(),
        reward=RewardConfig(
            name="quickstart", components={"mask_iou": 1.0, "parsed": 0.2}, ranked={"point_score": 0.5}
        ),
        algorithm=AlgorithmConfig(steps=60, prompts_per_step=32, group_size=8),
        learner=LearnerConfig(ranks=2, lr=2e-5),
        rollout=RolloutConfig(max_new_tokens=64, max_model_len=512),
        placement=PlacementConfig(name="cpu", device="cpu"),
        wandb=WandbConfig(mode="disabled"),
    )
    return replace(plain, **rooms)


def changed(base: Config, room: str, **values: Any) -> Config:
    """The settings with some values of one part replaced."""
    return replace(base, **{room: replace(getattr(base, room), **values)})
