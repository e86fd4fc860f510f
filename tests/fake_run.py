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
from learner.advantages import with_advantages
from perception import masks, views
from perception import metric_catalog as catalog
from perception.calibration import most_confident
from perception.config import Config, LookConfig
from perception.frames import image_to_view
from perception.metric_catalog import GREEDY, SAMPLED, HeldOut
from perception.types import (
    Answer,
    AnswerObject,
    Candidate,
    Failure,
    FailureKind,
    Group,
    ImageSource,
    Score,
    Target,
    Trajectory,
    Turn,
    Work,
)
from synthetic.scenes import ask, generate
from tests import builders

HOSTILE = "</pre><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\u202e </style>"
N = 8
SIDE = builders.SIDE
LOOK = LookConfig(mode="relook")


def config(output: Path, name: str = "quickstart", steps: int = 60, look: LookConfig | None = None) -> Config:
    return builders.changed(builders.config(output, name, look=look or LookConfig()), "algorithm", steps=steps)


def write_run(output: Path, steps: int = 60, image_dir: Path | None = None, look: LookConfig | None = None) -> Path:
    """A whole run of `steps` steps under `output`; returns its directory."""
    folder = image_dir or output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)

    def groups(seeds: range, spread: float) -> list[Group]:
        return [scene_group(folder, seed, spread, rng, look) for seed in seeds]

    with Recorder(config(output, steps=steps, look=look)) as recorder:
        recorder.evaluation(0, evaluation(0.0, look), groups(range(9000, 9008), 12.0))
        for step in range(1, steps + 1):
            progress = step / steps
            batch = with_advantages(groups(range(10 * step, 10 * step + 4), 13.0 - 7.0 * progress), "group")
            measured = metrics(step, progress, rng, look)
            recorder.step(step, measured, batch)
            recorder.worked(step, work(step, measured))
            if step % 20 == 0:
                recorder.evaluation(step, evaluation(progress, look), groups(range(9000, 9008), 12.0 - 6.0 * progress))
        recorder.summary(
            {
                "before": evaluation(0.0, look), "after": evaluation(1.0, look),
                "steps": steps, "seconds": 402.7, "restarts": {"rollout engines": 0}, "seed": 42,
                "data": "reason_seg, ignore=drop",
            }
        )  # fmt: skip
        return recorder.run_dir


def evaluation(progress: float, look: LookConfig | None = None) -> dict[str, float]:
    found = {
        HeldOut("segment", "mask_iou", GREEDY): 0.561 + 0.037 * progress,
        HeldOut("segment", "mask_iou", SAMPLED): 0.482 + 0.079 * progress,
        HeldOut("segment", catalog.PARSED): 0.991 + 0.007 * progress,
        HeldOut("segment", catalog.SAMPLES): 128,
    }
    if look is not None:
        found |= {one._replace(held_out="shifted"): v - 0.15 for one, v in found.items() if one.measure == "mask_iou"}
        found |= {
            HeldOut("segment", catalog.LOOK_RATE): 0.92 - 0.5 * progress,
            HeldOut("segment", catalog.LOOK_GAIN): 0.012 + 0.05 * progress,
        }
    return {one.name: value for one, value in found.items()}


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


def work(step: int, measured: dict[str, float]) -> list[Work]:
    """Who was busy in a step whose stages took so long; steps begin every ten seconds."""
    generate, score, learn, sync, own = (measured[name] for name in catalog.STAGES)
    began = 10.0 * step
    sampled = began + generate
    scored = sampled + score
    learned = scored + learn
    ended = learned + sync
    return [
        ("controller", f"step {step}", began, ended + own),
        ("rollout engine 0", "generate", began, sampled),
        ("rollout engine 0", "end update", learned, ended),
        ("reward worker 0", "score", began + 0.8, began + 1.4),
        ("reward worker 0", "score", began + 1.6, scored),
        ("learner rank 0", "update", scored, learned),
        ("learner rank 0", "send", learned, ended),
        ("learner rank 1", "update", scored, learned),
    ]


def scene_group(
    folder: Path, seed: int, spread: float, rng: np.random.Generator, look: LookConfig | None = None
) -> Group:
    """N rewarded answers to one scene, the truth moved by about `spread` pixels; with `look`, most look again."""
    scene = generate(seed)
    question = ask(scene, np.random.default_rng(seed))
    path = folder / f"{seed}.png"
    cv2.imwrite(str(path), scene.image[..., ::-1])
    truth = builders.scene_target([scene.objects[i] for i in question.targets])
    sample = builders.sample(
        f"scene-{seed}", truth, image=ImageSource(path=str(path)), question=question.text, task=question.task
    )
    trajectories = []
    for index in range(N):
        passes = [_pass(truth, spread, rng, broken=(seed + index) % 23 == 0)]
        if look is not None and (rect := _closer(passes[0][1], look)):
            height, width = views.picture_size(rect, look.pixels)
            turn, candidate = _pass(truth, spread / 2, rng, (seed + index) % 7 == 0, (rect, height, width))
            picture = views.picture(scene.image, rect, _outlined(passes[0][1]), look.pixels)
            passes.append((replace(turn, images=(builders.image(picture),)), candidate))
        trajectories.append(_trajectory(passes))
    prompt = builders.prompt(sample, images=(builders.image(scene.image),), seed=seed)
    return builders.group(*trajectories, about=prompt)


def _closer(first: Candidate, look: LookConfig) -> views.Rect | None:
    return views.closer_look(first.answer.objects, SIDE, SIDE, look.margin, look.smallest, look.min_zoom)


def _outlined(first: Candidate) -> np.ndarray | None:
    return masks.decode(first.mask) if first.mask else None


def _pass(
    truth: Target,
    spread: float,
    rng: np.random.Generator,
    broken: bool,
    shown: tuple[views.Rect, int, int] | None = None,
) -> tuple[Turn, Candidate]:
    """One look: the truth moved by about `spread` pixels, its boxes filled with ellipses; or no answer at all.

    `shown`: the view it is about, with its height and width.
    """
    view = builders.view(*shown[0], *shown[1:]) if shown else None
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
    turn = builders.turn(text, range(20, 20 + max(1, len(text) // 4)), version=3, view=view)
    sure = 0.0 if broken else float(np.clip(iou + rng.normal(0, 0.1), 0, 1))
    return turn, builders.candidate(
        0.0 if broken else iou,
        sure,
        answer=answer,
        features=(sure, 0.9, 0.8, -0.5, 0.0, float(view is not None), 0.0),
        mask=masks.encode(mask) if answer.objects else None,
    )


def _text(answer: Answer) -> str:
    found = [
        f'{{"bbox_2d": [{", ".join(f"{value:.0f}" for value in one.box or ())}], '
        f'"point_2d": [{", ".join(f"{value:.0f}" for value in one.point or ())}]}}'
        for one in answer.objects
    ]
    return f"<think>It stands out.</think><answer>[{','.join(found)}]</answer>"


def _trajectory(passes: Sequence[tuple[Turn, Candidate]]) -> Trajectory:
    """The most confident pass is kept; one that did not parse fails them all."""
    candidates = tuple(candidate for _, candidate in passes)
    kept = most_confident(candidates)
    best = candidates[kept]
    iou = best.mask_iou or 0.0
    metrics = {"mask_iou": iou, "parsed": float(best.answer.failure is None), "point_score": float(iou > 0.3)}
    return builders.trajectory(
        *(turn for turn, _ in passes),
        failure=next((one.answer.failure for one in candidates if one.answer.failure), None),
        score=Score(metrics=metrics, candidates=candidates, kept=kept),
        reward=metrics["mask_iou"] + 0.2 * metrics["parsed"] + 0.5 * metrics["point_score"],
    )


if __name__ == "__main__":
    import sys

    print(write_run(Path(sys.argv[1]), look=LOOK if "relook" in sys.argv[2:] else None))
