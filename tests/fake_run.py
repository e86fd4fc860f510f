"""A run directory written by the real Recorder from invented figures: answers to real scenes that sharpen step by step.

Some answers fail, and some try to break out of the page they will be shown on.
"""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco

from launch.recorder import Recorder
from perception import names, scenes
from perception.config import (
    AlgorithmConfig,
    Config,
    DataConfig,
    LearnerConfig,
    ModelConfig,
    PlacementConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
    WandbConfig,
)
from perception.types import (
    Answer,
    AnswerObject,
    Failure,
    FailureKind,
    Group,
    ImageHandle,
    Prompt,
    Rle,
    Sample,
    Score,
    ScoredGroup,
    Target,
    Trajectory,
    Turn,
    VersionSpan,
)

HOSTILE = "</pre><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\u202e </style>"
N = 8


def config(output: Path, name: str = "quickstart", resume: str | None = None, steps: int = 60) -> Config:
    return Config(
        run=RunConfig(name=name, output=str(output), resume=resume, rollouts_kept=4),
        model=ModelConfig(path="assets/policy", segmenter="assets/segmenter"),
        data=DataConfig(format="coco", train="data/train.json", eval="data/eval.json"),
        task={"segment": TaskConfig(system="You see.", template="Find {question}.")},
        reward=RewardConfig(
            name="quickstart", components={"mask_iou": 1.0, "parsed": 0.2}, ranked={"point_score": 0.5}
        ),
        algorithm=AlgorithmConfig(steps=steps, prompts_per_step=32, group_size=N),
        learner=LearnerConfig(ranks=2, lr=2e-5),
        rollout=RolloutConfig(max_new_tokens=64, max_model_len=512),
        placement=PlacementConfig(name="cpu", device="cpu"),
        wandb=WandbConfig(mode="disabled"),
    )


def write_run(output: Path, steps: int = 60, image_dir: Path | None = None) -> Path:
    """A whole run of `steps` steps under `output`; returns its directory."""
    images = image_dir or output / "images"
    images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with Recorder(config(output, steps=steps)) as recorder:
        held_out = [scored_group(images, 9000 + i, 12.0, rng) for i in range(8)]
        recorder.evaluation(0, evaluation(0.0), held_out)
        for step in range(1, steps + 1):
            progress = step / steps
            groups = [scored_group(images, 10 * step + i, 13.0 - 7.0 * progress, rng) for i in range(4)]
            rewards = [[reward(score) for score in entry.scores] for entry in groups]
            advantages = [((np.array(row) - np.mean(row)) / (np.std(row) + 1e-6)).tolist() for row in rewards]
            recorder.step(step, metrics(step, progress, rng), groups, rewards, advantages)
            if step % 20 == 0:
                held_out = [scored_group(images, 9000 + i, 12.0 - 6.0 * progress, rng) for i in range(8)]
                recorder.evaluation(step, evaluation(progress), held_out)
        recorder.summary(
            {
                "before": {"giou_greedy": 0.561, "giou_sampled": 0.482},
                "after": {"giou_greedy": 0.598, "giou_sampled": 0.561},
                "steps": steps, "seconds": 402.7, "parse_ok": 0.998,
            }
        )  # fmt: skip
        return recorder.run_dir


def evaluation(progress: float) -> dict[str, float]:
    return {
        names.GIOU_GREEDY: 0.561 + 0.037 * progress,
        names.GIOU_SAMPLED: 0.482 + 0.079 * progress,
        names.HELD_OUT_PARSE_OK: 0.991 + 0.007 * progress,
        "samples": 128,
    }


def metrics(step: int, progress: float, rng: np.random.Generator) -> dict[str, float]:
    noise = rng.normal(size=8)
    seconds = {
        names.SECONDS_GENERATE: 2.1 + 0.2 * noise[0] ** 2,
        names.SECONDS_SCORE: 1.3 + 0.1 * noise[1],
        names.SECONDS_LEARN: 2.4 + 0.15 * noise[2],
        names.SECONDS_SYNC: 0.12 + 0.01 * noise[3],
        names.SECONDS_CONTROLLER: 0.11,
    }
    return seconds | {
        names.SECONDS_STEP: sum(seconds.values()),
        names.REWARD_MEAN: 0.62 + 0.12 * progress + 0.03 * noise[4],
        names.REWARD_STD: 0.24 - 0.05 * progress,
        names.ZERO_VARIANCE: 0.03,
        names.PARSE_OK: min(1.0, 0.99 + 0.003 * noise[5]),
        names.GIOU: 0.48 + 0.08 * progress + 0.03 * noise[4],
        names.ENTROPY: math.nan if step == 7 else 0.81 - 0.2 * progress + 0.02 * noise[6],
        names.RATIO: 1.0 + 0.0004 * noise[7],
        names.CLIP_LOW: 0.004, names.CLIP_HIGH: 0.006,
        names.LOGPROB_MISMATCH: 4e-7 + 1e-8 * noise[3], names.SYNC_PAUSE: 0.11, names.SYNC_TRANSFER: 0.06,
        names.GRAD_NORM: 0.8 + 0.2 * noise[2] ** 2,
        names.LR: 2e-5,
        names.RESPONSE_TOKENS: 31 - 2 * progress + 0.4 * noise[1],
        names.TOKENS_PER_S: 1250 + 40 * noise[0],
        names.SAMPLES_PER_S: 42.0 + noise[0],
        names.SAM_CACHE_HITS: 0.0,
        names.BOXES_ANSWERED: 1.21, names.BOXES_TRUE: 1.18,
        names.component("mask_iou"): 0.48 + 0.08 * progress,
        names.component("parsed"): 0.99,
        names.component("point_score"): 0.6,
        names.failure(FailureKind.UNPARSED): max(0.0, 0.01 - 0.008 * progress),
        names.failure(FailureKind.TRUNCATED): 0.004,
        names.POLICY_VERSION: float(step - 1),
    }  # fmt: skip


def reward(score: Score) -> float:
    return score.metrics["mask_iou"] + 0.2 * score.metrics["parsed"] + 0.5 * score.metrics["point_score"]


def scored_group(images: Path, seed: int, spread: float, rng: np.random.Generator) -> ScoredGroup:
    """N answers to one scene, each the truth moved by about `spread` pixels."""
    scene = scenes.generate(seed)
    question = scenes.ask(scene, np.random.default_rng(seed))
    path = images / f"{seed}.png"
    cv2.imwrite(str(path), scene.image[..., ::-1])
    height, width = scene.image.shape[:2]
    targets = [scene.objects[i] for i in question.targets]
    truth = Target(
        boxes=np.array([t.box for t in targets], np.float32).reshape(-1, 4),
        points=np.array([t.point for t in targets], np.float32).reshape(-1, 2),
        masks=tuple(rle(t.mask) for t in targets),
    )
    sample = Sample(
        id=f"scene-{seed}", image_path=str(path), height=height, width=width,
        question=question.text, task=question.task, target=truth,
    )  # fmt: skip
    handle = ImageHandle(key=f"{seed:064x}", height=height, width=width, ref=path.read_bytes())
    prompt = Prompt(
        sample=sample, token_ids=(1, 2, 3), images=(handle,), answer_height=height, answer_width=width, seed=seed
    )
    answers = [_answer(index, seed, truth, spread, rng) for index in range(N)]
    return ScoredGroup(
        group=Group(prompt=prompt, trajectories=tuple(trajectory for trajectory, _ in answers)),
        scores=tuple(score for _, score in answers),
        seconds=0.05,
        cached=False,
    )


def rle(mask: np.ndarray) -> Rle:
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return Rle(height=mask.shape[0], width=mask.shape[1], counts=encoded["counts"])


def _answer(index: int, seed: int, truth: Target, spread: float, rng: np.random.Generator) -> tuple[Trajectory, Score]:
    broken = (seed + index) % 23 == 0
    boxes = np.clip(truth.boxes + rng.normal(0, spread / 2, truth.boxes.shape), 0, 112).round()
    boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:]) + 1], axis=1)
    objects = ",".join(
        f'{{"bbox_2d": [{b[0]:.0f}, {b[1]:.0f}, {b[2]:.0f}, {b[3]:.0f}], '
        f'"point_2d": [{(b[0] + b[2]) / 2:.0f}, {(b[1] + b[3]) / 2:.0f}]}}'
        for b in boxes
    )
    text = HOSTILE if broken else f"<think>It stands out.</think><answer>[{objects}]</answer>"
    ids = tuple(range(20, 20 + max(1, len(text) // 4)))
    turn = Turn(
        input_ids=(1, 2, 3), images=(), token_ids=ids, logprobs=(-0.5,) * len(ids),
        versions=(VersionSpan(version=3, start=0, end=len(ids)),), text=text, finish_reason="stop",
    )  # fmt: skip
    if broken:
        failure = Failure(kind=FailureKind.UNPARSED, detail="no <answer> in the completion")
        score = Score(
            metrics={"mask_iou": 0.0, "parsed": 0.0, "point_score": 0.0}, answer=Answer(objects=(), failure=failure)
        )
        return Trajectory(index=index, turns=(turn,)), score
    mask = np.zeros((112, 112), bool)
    for x1, y1, x2, y2 in boxes.astype(int):
        cv2_mask = np.zeros((112, 112), np.uint8)
        cv2.ellipse(cv2_mask, ((x1 + x2) // 2, (y1 + y2) // 2), ((x2 - x1) // 2, (y2 - y1) // 2), 0, 0, 360, 1, -1)
        mask |= cv2_mask.astype(bool)
    true_mask = np.zeros((112, 112), bool)
    for part in truth.masks:
        true_mask |= coco.decode({"size": [112, 112], "counts": part.counts}).astype(bool)
    union = (mask | true_mask).sum()
    iou = float((mask & true_mask).sum() / union) if union else 1.0
    found = tuple(
        AnswerObject(box=tuple(map(float, b)), point=(float(b[0] + b[2]) / 2, float(b[1] + b[3]) / 2))  # type: ignore[arg-type]
        for b in boxes
    )
    score = Score(
        metrics={"mask_iou": iou, "parsed": 1.0, "point_score": float(iou > 0.3)},
        answer=Answer(objects=found),
        mask=rle(mask) if len(boxes) else None,
        confidence=0.9,
    )
    return Trajectory(index=index, turns=(turn,)), score


if __name__ == "__main__":
    import sys

    print(write_run(Path(sys.argv[1])))
