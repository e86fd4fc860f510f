"""A run directory written by the real Recorder from invented figures: answers to real scenes that sharpen step by step.

Some answers fail, and some try to break out of the page they will be shown on. A run of `look=relook` looks at most
answers twice, and is evaluated on a second held-out set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from launch.record.recorder import Recorder
from perception import images, masks, scenes, views
from perception import metric_catalog as catalog
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
from perception.frames import image_to_view
from perception.types import (
    Answer,
    AnswerObject,
    Candidate,
    Failure,
    FailureKind,
    Group,
    ImageHandle,
    Prompt,
    Sample,
    Score,
    ScoredGroup,
    Target,
    Trajectory,
    Turn,
    VersionSpan,
    View,
)

HOSTILE = "</pre><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\u202e </style>"
N = 8
SIDE = 112
LOOK = LookConfig(mode="relook")


def config(
    output: Path,
    name: str = "quickstart",
    resume: str | None = None,
    steps: int = 60,
    look: LookConfig | None = None,
) -> Config:
    return Config(
        run=RunConfig(name=name, output=str(output), resume=resume, rollouts_kept=4),
        model=ModelConfig(path="assets/policy", segmenter="assets/segmenter"),
        data=DataConfig(format="coco", train="data/train.json", eval="data/eval.json"),
        task={
            "segment": TaskConfig(
                system="You see.", template="Find {question}.", inline="Look for {question}.", again="Closer."
            )
        },
        look=look or LookConfig(),
        reward=RewardConfig(
            name="quickstart", components={"mask_iou": 1.0, "parsed": 0.2}, ranked={"point_score": 0.5}
        ),
        algorithm=AlgorithmConfig(steps=steps, prompts_per_step=32, group_size=N),
        learner=LearnerConfig(ranks=2, lr=2e-5),
        rollout=RolloutConfig(max_new_tokens=64, max_model_len=512),
        placement=PlacementConfig(name="cpu", device="cpu"),
        wandb=WandbConfig(mode="disabled"),
    )


def write_run(output: Path, steps: int = 60, image_dir: Path | None = None, look: LookConfig | None = None) -> Path:
    """A whole run of `steps` steps under `output`; returns its directory."""
    folder = image_dir or output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)

    def groups(seeds: range, spread: float) -> list[ScoredGroup]:
        return [scored_group(folder, seed, spread, rng, look) for seed in seeds]

    with Recorder(config(output, steps=steps, look=look)) as recorder:
        recorder.evaluation(0, evaluation(0.0, look), groups(range(9000, 9008), 12.0))
        for step in range(1, steps + 1):
            progress = step / steps
            scored = groups(range(10 * step, 10 * step + 4), 13.0 - 7.0 * progress)
            rewards = [[reward(score) for score in entry.scores] for entry in scored]
            advantages = [((np.array(row) - np.mean(row)) / (np.std(row) + 1e-6)).tolist() for row in rewards]
            recorder.step(step, metrics(step, progress, rng, look), scored, rewards, advantages)
            if step % 20 == 0:
                recorder.evaluation(step, evaluation(progress, look), groups(range(9000, 9008), 12.0 - 6.0 * progress))
        recorder.summary(
            {
                "before": evaluation(0.0, look), "after": evaluation(1.0, look),
                "steps": steps, "seconds": 402.7, "parse_ok": 0.998,
            }
        )  # fmt: skip
        return recorder.run_dir


def evaluation(progress: float, look: LookConfig | None = None) -> dict[str, float]:
    found = {
        catalog.GIOU_GREEDY: 0.561 + 0.037 * progress,
        catalog.GIOU_SAMPLED: 0.482 + 0.079 * progress,
        catalog.HELD_OUT_PARSE_OK: 0.991 + 0.007 * progress,
        catalog.HELD_OUT_SAMPLES: 128,
    }
    if look is None:
        return found
    looked = {
        catalog.HELD_OUT_RELOOK_RATE: 0.92 - 0.5 * progress,
        catalog.HELD_OUT_LOOK_GAIN: 0.012 + 0.05 * progress,
    }
    shifted = {f"{name}/shifted": value - 0.15 for name, value in found.items() if name.startswith("giou")}
    return found | looked | shifted


def metrics(step: int, progress: float, rng: np.random.Generator, look: LookConfig | None = None) -> dict[str, float]:
    noise = rng.normal(size=8)
    seconds = {
        catalog.SECONDS_GENERATE: 2.1 + 0.2 * noise[0] ** 2,
        catalog.SECONDS_SCORE: 1.3 + 0.1 * noise[1],
        catalog.SECONDS_LEARN: 2.4 + 0.15 * noise[2],
        catalog.SECONDS_SYNC: 0.12 + 0.01 * noise[3],
        catalog.SECONDS_CONTROLLER: 0.11,
    }
    looked = {
        catalog.LOOK_PASSES: 1.9 - 0.5 * progress,
        catalog.RELOOK_RATE: 0.9 - 0.5 * progress + 0.02 * noise[0],
        catalog.RELOOK_CHANGED: 0.4 + 0.2 * progress + 0.02 * noise[1],
        catalog.RELOOK_GAIN: 0.06 * progress + 0.02 * noise[2],
        catalog.CONFIDENCE: 0.5 + 0.1 * progress + 0.01 * noise[3],
        catalog.THRESHOLD: 1.0 if progress < 0.1 else 0.74 + 0.01 * noise[4],
        catalog.CALIBRATION_ERROR: 0.12 - 0.08 * progress + 0.01 * noise[5] ** 2,
        catalog.PREFIX_HITS: 0.93,
    }
    return seconds | (looked if look else {}) | {
        catalog.SECONDS_STEP: sum(seconds.values()),
        catalog.REWARD_MEAN: 0.62 + 0.12 * progress + 0.03 * noise[4],
        catalog.REWARD_STD: 0.24 - 0.05 * progress,
        catalog.ZERO_VARIANCE: 0.03,
        catalog.PARSE_OK: min(1.0, 0.99 + 0.003 * noise[5]),
        catalog.GIOU: 0.48 + 0.08 * progress + 0.03 * noise[4],
        catalog.ENTROPY: math.nan if step == 7 else 0.81 - 0.2 * progress + 0.02 * noise[6],
        catalog.RATIO: 1.0 + 0.0004 * noise[7],
        catalog.CLIP_LOW: 0.004, catalog.CLIP_HIGH: 0.006,
        catalog.LOGPROB_MISMATCH: 4e-7 + 1e-8 * noise[3], catalog.SYNC_PAUSE: 0.11, catalog.SYNC_TRANSFER: 0.06,
        catalog.GRAD_NORM: 0.8 + 0.2 * noise[2] ** 2,
        catalog.LR: 2e-5,
        catalog.RESPONSE_TOKENS: 31 - 2 * progress + 0.4 * noise[1],
        catalog.TOKENS_PER_S: 1250 + 40 * noise[0],
        catalog.SAMPLES_PER_S: 42.0 + noise[0],
        catalog.SAM_CACHE_HITS: 0.0,
        catalog.BOXES_ANSWERED: 1.21, catalog.BOXES_TRUE: 1.18,
        catalog.component("mask_iou"): 0.48 + 0.08 * progress,
        catalog.component("parsed"): 0.99,
        catalog.component("point_score"): 0.6,
        catalog.failure(FailureKind.UNPARSED): max(0.0, 0.01 - 0.008 * progress),
        catalog.failure(FailureKind.TRUNCATED): 0.004,
        catalog.POLICY_VERSION: float(step - 1),
    }  # fmt: skip


def reward(score: Score) -> float:
    return score.metrics["mask_iou"] + 0.2 * score.metrics["parsed"] + 0.5 * score.metrics["point_score"]


def scored_group(
    folder: Path, seed: int, spread: float, rng: np.random.Generator, look: LookConfig | None = None
) -> ScoredGroup:
    """N answers to one scene, each the truth moved by about `spread` pixels; with `look`, most are looked at again."""
    scene = scenes.generate(seed)
    question = scenes.ask(scene, np.random.default_rng(seed))
    path = folder / f"{seed}.png"
    cv2.imwrite(str(path), scene.image[..., ::-1])
    targets = [scene.objects[i] for i in question.targets]
    truth = Target(
        boxes=np.array([t.box for t in targets], np.float32).reshape(-1, 4),
        points=np.array([t.point for t in targets], np.float32).reshape(-1, 2),
        masks=tuple(masks.encode(t.mask) for t in targets),
    )
    sample = Sample(
        id=f"scene-{seed}", image_path=str(path), height=SIDE, width=SIDE,
        question=question.text, task=question.task, target=truth,
    )  # fmt: skip
    handle = ImageHandle(key=f"{seed:064x}", height=SIDE, width=SIDE, ref=path.read_bytes())
    prompt = Prompt(
        sample=sample, token_ids=(1, 2, 3), images=(handle,), answer_height=SIDE, answer_width=SIDE, seed=seed
    )
    answers = []
    for index in range(N):
        passes = [_pass(truth, spread, rng, broken=(seed + index) % 23 == 0)]
        if look is not None and (rect := _closer(passes[0][1], look)):
            size = views.picture_size(rect, look.pixels)
            view = View(left=rect[0], top=rect[1], right=rect[2], bottom=rect[3], height=size[0], width=size[1])
            turn, candidate = _pass(truth, spread / 2, rng, broken=(seed + index) % 7 == 0, view=view)
            picture = views.picture(scene.image, rect, _outlined(passes[0][1]), look.pixels)
            shown = ImageHandle(key=f"{seed}-{index}", height=size[0], width=size[1], ref=images.encode(picture))
            passes.append((replace(turn, images=(shown,)), candidate))
        answers.append(_answer(index, passes))
    return ScoredGroup(
        group=Group(prompt=prompt, trajectories=tuple(trajectory for trajectory, _ in answers)),
        scores=tuple(score for _, score in answers),
        seconds=0.05,
        cached=False,
    )


def _closer(first: Candidate, look: LookConfig) -> views.Rect | None:
    return views.closer_look(first.answer.objects, SIDE, SIDE, look.margin, look.smallest, look.min_zoom)


def _outlined(first: Candidate) -> np.ndarray | None:
    return masks.decode(first.mask) if first.mask else None


def _pass(
    truth: Target, spread: float, rng: np.random.Generator, broken: bool, view: View | None = None
) -> tuple[Turn, Candidate]:
    """One look: the truth moved by about `spread` pixels, its boxes filled with ellipses; or no answer at all."""
    boxes = np.clip(truth.boxes + rng.normal(0, spread / 2, truth.boxes.shape), 0, SIDE).round()
    boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:]) + 1], axis=1)
    objects = tuple(AnswerObject(box=(a, b, c, d), point=((a + c) / 2, (b + d) / 2)) for a, b, c, d in boxes.tolist())
    failure = Failure(kind=FailureKind.UNPARSED, detail="no <answer> in the completion") if broken else None
    answer = Answer(objects=() if broken else objects, failure=failure)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for a, b, c, d in () if broken else boxes.astype(int).tolist():
        cv2.ellipse(mask, ((a + c) // 2, (b + d) // 2), ((c - a) // 2, (d - b) // 2), 0, 0, 360, 1, -1)
    true = masks.decode(masks.union(truth.masks, SIDE, SIDE))
    iou = float((mask & true).sum() / (mask | true).sum()) if (mask | true).any() else 1.0
    text = HOSTILE if broken else _text(image_to_view(answer, view) if view else answer)
    ids = tuple(range(20, 20 + max(1, len(text) // 4)))
    turn = Turn(
        input_ids=(1, 2, 3), images=(), token_ids=ids, logprobs=(-0.5,) * len(ids),
        versions=(VersionSpan(version=3, start=0, end=len(ids)),), text=text, finish_reason="stop", view=view,
    )  # fmt: skip
    sure = 0.0 if broken else float(np.clip(iou + rng.normal(0, 0.1), 0, 1))
    return turn, Candidate(
        answer=answer,
        features=(sure, 0.9, 0.8, -0.5, 0.0, float(view is not None), 0.0),
        confidence=sure,
        mask_iou=0.0 if broken else iou,
        mask=masks.encode(mask) if answer.objects else None,
    )


def _text(answer: Answer) -> str:
    found = [
        f'{{"bbox_2d": [{", ".join(f"{value:.0f}" for value in one.box or ())}], '
        f'"point_2d": [{", ".join(f"{value:.0f}" for value in one.point or ())}]}}'
        for one in answer.objects
    ]
    return f"<think>It stands out.</think><answer>[{','.join(found)}]</answer>"


def _answer(index: int, passes: Sequence[tuple[Turn, Candidate]]) -> tuple[Trajectory, Score]:
    """The most confident pass is kept; one that did not parse fails them all."""
    candidates = tuple(candidate for _, candidate in passes)
    kept = max(range(len(candidates)), key=lambda i: candidates[i].confidence)
    best = candidates[kept]
    iou = best.mask_iou or 0.0
    score = Score(
        metrics={"mask_iou": iou, "parsed": float(best.answer.failure is None), "point_score": float(iou > 0.3)},
        answer=best.answer,
        mask=best.mask,
        confidence=best.confidence,
        failure=next((one.answer.failure for one in candidates if one.answer.failure), None),
        candidates=candidates,
        kept=kept,
    )
    return Trajectory(index=index, turns=tuple(turn for turn, _ in passes)), score


if __name__ == "__main__":
    import sys

    print(write_run(Path(sys.argv[1]), look=LOOK if "relook" in sys.argv[2:] else None))
