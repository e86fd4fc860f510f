"""The reward worker: turns a group of completions into metrics, with SAM2 where masks are needed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from perception import answers, masks
from perception.config import ModelConfig, RewardConfig
from perception.frames import Frame, convert_answer
from perception.images import ImageCache
from perception.types import Answer, Failure, FailureKind, Group, ImageHandle, Rle, Score, ScoredGroup, Trajectory
from reward_workers.rewards import COMPONENTS, MASK_COMPONENTS, UNMEASURED, Case, components_in_use

if TYPE_CHECKING:
    from reward_workers.segmenter import Segmentation, Segmenter

FETCH_TIMEOUT_S = 60.0


class RewardWorker:
    """Runs as a Ray actor. SAM2 (and torch) is loaded only where a component or a caller asks for masks."""

    def __init__(self, config: RewardConfig, model: ModelConfig, device: str, threads: int) -> None:
        """`threads`: intra-op threads of torch, 0 for its own default."""
        self._config, self._model, self._device, self._threads = config, model, device, threads
        self._names = components_in_use(config)
        self._images = ImageCache(_fetch, config.image_cache)
        self._loaded: Segmenter | None = None
        self._groups, self._seconds = 0, 0.0

    def start(self) -> float:
        """Load what the configured components need; returns the seconds that took."""
        started = time.perf_counter()
        if MASK_COMPONENTS.intersection(self._names):
            self._segmenter()
        return time.perf_counter() - started

    def score(self, group: Group, want_masks: bool = False, names: tuple[str, ...] | None = None) -> ScoredGroup:
        """Measure every trajectory by the configured components, or by `names`; `want_masks` adds the answers' masks.

        Where the engine failed nothing is measured: the score carries the failure and no metrics. Raises ValueError
        where masks are to be compared and the sample has none, DataError when the image does not decode.
        """
        started = time.perf_counter()
        names = self._names if names is None else names
        sample = group.prompt.sample
        read = [_read(trajectory, group) for trajectory in group.trajectories]
        compare = bool(MASK_COMPONENTS.intersection(names))
        segmentation, cached = None, False
        if compare or want_masks:
            segmentation, cached = self._segment(group.prompt.images[0], read)
        overlaps = np.zeros((len(read), 2))
        if segmentation is not None and compare:
            overlaps = segmentation.overlaps(_true_mask(group))
        scores = []
        for index, (trajectory, answer) in enumerate(zip(group.trajectories, read, strict=True)):
            case = Case(
                text=trajectory.text,
                answer=answer,
                target=sample.target,
                image=Frame(sample.height, sample.width),
                answer_frame=Frame(group.prompt.answer_height, group.prompt.answer_width),
                published=self._config.matching == "binary",
                mask_iou=float(overlaps[index, 0]),
                mask_dice=float(overlaps[index, 1]),
            )
            mask, confidence = _result(segmentation, index, answer, want_masks)
            measured = trajectory.failure is None or trajectory.failure.kind not in UNMEASURED
            score = Score(
                metrics={name: COMPONENTS[name](case) for name in names} if measured else {},
                answer=answer,
                mask=mask,
                confidence=confidence,
                failure=trajectory.failure or answer.failure,
            )
            scores.append(score)
        seconds = time.perf_counter() - started
        self._groups, self._seconds = self._groups + 1, self._seconds + seconds
        return ScoredGroup(group=group, scores=tuple(scores), seconds=seconds, cached=cached)

    def segment(self, image: ImageHandle, read: Sequence[Answer]) -> list[tuple[Rle | None, float]]:
        """Provisional masks without any truth: per answer (original pixels) its union mask and SAM2's confidence.

        None for an answer with nothing to segment.
        """
        segmentation, _ = self._segment(image, read)
        return [_result(segmentation, index, answer, True) for index, answer in enumerate(read)]

    def stats(self) -> Mapping[str, float]:
        """Since the start: groups scored, seconds spent, and how often an image's embedding was there already."""
        hits, misses = (self._loaded.hits, self._loaded.misses) if self._loaded else (0, 0)
        return {"groups": self._groups, "seconds": self._seconds, "cache_hits": hits, "cache_misses": misses}

    def _segment(self, handle: ImageHandle, read: Sequence[Answer]) -> tuple[Segmentation, bool]:
        segmenter = self._segmenter()
        embedding, cached = segmenter.embed(handle.key, lambda: self._images.get(handle))
        boxes, points, owners = _prompts(read, embedding.height, embedding.width)
        return segmenter.segment(embedding, boxes, points, owners, len(read), self._config.multimask), cached

    def _segmenter(self) -> Segmenter:
        if self._loaded is None:
            import torch

            from reward_workers.segmenter import Segmenter

            if self._threads:
                torch.set_num_threads(self._threads)
            dtype = torch.bfloat16 if self._device == "cuda" else torch.float32
            self._loaded = Segmenter.load(self._model.segmenter, self._device, dtype, self._config.image_cache)
        return self._loaded


def _read(trajectory: Trajectory, group: Group) -> Answer:
    """The answer in original pixels."""
    if trajectory.failure is not None and trajectory.failure.kind in UNMEASURED:
        return Answer(objects=(), failure=trajectory.failure)
    prompt = group.prompt
    answer = answers.parse(trajectory.text, prompt.sample.task)
    written = Frame(prompt.answer_height, prompt.answer_width)
    return convert_answer(answer, written, Frame(prompt.sample.height, prompt.sample.width))


def _prompts(read: Sequence[Answer], height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (N, 4) and points (N, 2) that lie in the image, NaN where not given, and each prompt's answer (N,)."""
    rows = [
        (*(item.box or (np.nan,) * 4), *(item.point or (np.nan,) * 2), owner)
        for owner, answer in enumerate(read)
        for item in answer.objects
    ]
    table = np.array(rows, np.float64).reshape(-1, 7)
    boxes, points, owners = table[:, :4], table[:, 4:6], table[:, 6].astype(np.int64)
    limit = np.array([width, height], np.float64)
    boxes = np.clip(boxes, 0, np.tile(limit, 2))
    boxes[~(boxes[:, 2:] > boxes[:, :2]).all(1)] = np.nan
    points[~((points >= 0) & (points < limit)).all(1)] = np.nan
    given = ~(np.isnan(boxes).any(1) & np.isnan(points).any(1))
    return boxes[given], points[given], owners[given]


def _true_mask(group: Group) -> np.ndarray:
    """Union of the true masks, (H, W) bool."""
    sample = group.prompt.sample
    if sample.target.count and not sample.target.masks:
        raise ValueError(f"sample '{sample.id}' has no masks: reward without mask_iou, or add masks to the data")
    return masks.decode(masks.union(sample.target.masks, sample.height, sample.width))


def _result(segmentation: Segmentation | None, index: int, answer: Answer, want_mask: bool) -> tuple[Rle | None, float]:
    if segmentation is None:
        return None, 0.0
    mask = masks.encode(segmentation.mask(index)) if want_mask and answer.objects else None
    return mask, float(segmentation.confidence[index])


def _fetch(ref: Any) -> bytes:
    """Encoded bytes, out of Ray's object store where the handle holds a reference."""
    return ray.get(ref, timeout=FETCH_TIMEOUT_S) if isinstance(ref, ray.ObjectRef) else ref


def failed_group(group: Group, detail: str) -> ScoredGroup:
    """A group that could not be scored: every trajectory marked, none measured."""
    failure = Failure(kind=FailureKind.SCORER, detail=detail)
    score = Score(metrics={}, answer=Answer(objects=(), failure=failure), failure=failure)
    return ScoredGroup(group=group, scores=(score,) * len(group.trajectories), seconds=0.0, cached=False)
