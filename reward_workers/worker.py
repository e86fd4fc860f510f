"""The reward worker: turns a group of completions into metrics, with SAM2 where masks are needed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from perception import images, masks, views
from perception.calibration import confidence, most_confident
from perception.config import LookConfig, ModelConfig, RewardConfig
from perception.frames import Frame
from perception.images import ImageCache
from perception.types import (
    Answer,
    Candidate,
    Failure,
    FailureKind,
    Finding,
    Group,
    ImageHandle,
    LookState,
    Score,
    ScoredGroup,
    Trajectory,
)
from reward_workers.candidates import confidence_features, judge
from reward_workers.reading import Pass, mask_prompts, read_passes, view_of
from reward_workers.rewards import (
    ARRAY_COMPONENTS,
    COMPONENTS,
    MASK_COMPONENTS,
    Case,
    compares_masks,
    components_in_use,
)
from runtime.objects import fetch

if TYPE_CHECKING:
    from reward_workers.segmenter import Segmentation, Segmenter

_UNREAD = Pass(Answer(objects=(), failure=Failure(kind=FailureKind.ENGINE, detail="nothing was answered")), None, 0)


class RewardWorker:
    """Runs as a Ray actor. SAM2 (and torch) is loaded only where a component or a caller asks for masks."""

    def __init__(self, config: RewardConfig, look: LookConfig, model: ModelConfig, device: str, threads: int) -> None:
        """`threads`: intra-op threads of torch, 0 for its own default."""
        self._config, self._look, self._model, self._device, self._threads = config, look, model, device, threads
        self._names = components_in_use(config)
        self._compares = compares_masks(config)
        self._images = ImageCache(fetch, config.image_cache)
        self._loaded: Segmenter | None = None
        self._groups, self._seconds = 0, 0.0

    def start(self) -> float:
        """Load what the configured components need; returns the seconds that took."""
        started = time.perf_counter()
        if self._compares or self._look.mode == "relook":
            self._segmenter()
        return time.perf_counter() - started

    def score(
        self,
        group: Group,
        want_masks: bool = False,
        names: tuple[str, ...] | None = None,
        look: LookState | None = None,
    ) -> ScoredGroup:
        """Measure every trajectory by the configured components, or by `names`; `want_masks` adds the answers' masks.

        Of several passes the most confident one counts, by the calibration in `look`. Where the engine failed nothing
        is measured: the score carries the failure and no metrics. Raises ValueError where masks are to be compared and
        the sample has none, DataError when the image does not decode.
        """
        started = time.perf_counter()
        names = self._names if names is None else names
        read = [read_passes(trajectory, group) for trajectory in group.trajectories]
        passes = [one for own in read for one in own]
        compare = self._compares or look is not None or bool(MASK_COMPONENTS.intersection(names))
        truth = _true_mask(group) if compare else None
        segmentation, cached = None, False
        if compare or want_masks:
            segmentation, cached = self._segment(group.prompt.images[0], passes)
        judged = judge(passes, segmentation, truth, look, want_masks)
        scores, first = [], 0
        for trajectory, own in zip(group.trajectories, read, strict=True):
            candidates = tuple(judged[first : first + len(own)])
            kept = most_confident(candidates) if len(candidates) > 1 else 0
            answered = None
            if own and segmentation is not None and ARRAY_COMPONENTS.intersection(names):
                answered = segmentation.mask(first + kept)
            scores.append(self._score(group, trajectory, candidates, kept, (answered, truth), names))
            first += len(own)
        seconds = time.perf_counter() - started
        self._groups, self._seconds = self._groups + 1, self._seconds + seconds
        return ScoredGroup(group=group, scores=tuple(scores), seconds=seconds, cached=cached)

    def examine(self, group: Group, look: LookState) -> list[Finding]:
        """How far the last answer of each trajectory can be believed, without any truth, and the view it calls for.

        Raises DataError when the image does not decode.
        """
        image = self._images.get(group.prompt.images[0])
        last = [(read_passes(trajectory, group) or (_UNREAD,))[-1] for trajectory in group.trajectories]
        segmentation, _ = self._segment(group.prompt.images[0], last)
        sure = confidence(look, confidence_features(last, segmentation.features)).tolist()
        findings = []
        for place, (trajectory, one) in enumerate(zip(group.trajectories, last, strict=True)):
            seed = (group.prompt.seed, trajectory.index)
            rect = self._due(one.answer, sure[place], image.shape[:2], look, seed)
            if rect is None:
                findings.append(Finding(confidence=sure[place]))
                continue
            picture = views.picture(image, rect, segmentation.mask(place), self._look.pixels)
            height, width = picture.shape[:2]
            findings.append(
                Finding(
                    confidence=sure[place],
                    view=rect,
                    picture=images.encode(picture),
                    picture_height=height,
                    picture_width=width,
                )
            )
        return findings

    def _due(
        self, answer: Answer, sure: float, size: tuple[int, int], look: LookState, seed: tuple[int, int]
    ) -> views.Rect | None:
        """The rectangle to look at again, if that is due. An explored look is drawn from `seed`."""
        config = self._look
        if config.trigger == "never" or answer.failure is not None:
            return None
        doubtful = config.trigger == "always" or not look.weights or sure < look.threshold
        if not doubtful and not np.random.default_rng(seed).random() < look.explore:
            return None
        return views.closer_look(answer.objects, *size, config.margin, config.smallest, config.min_zoom)

    def stats(self) -> Mapping[str, float]:
        """Since the start: groups scored, seconds spent, and how often an image's embedding was there already."""
        seen = self._loaded.embeddings if self._loaded else None
        hits, misses = (seen.hits, seen.misses) if seen else (0, 0)
        return {"groups": self._groups, "seconds": self._seconds, "cache_hits": hits, "cache_misses": misses}

    def _score(
        self,
        group: Group,
        trajectory: Trajectory,
        candidates: tuple[Candidate, ...],
        kept: int,
        arrays: tuple[np.ndarray | None, np.ndarray | None],
        names: tuple[str, ...],
    ) -> Score:
        if not candidates:
            return Score(metrics={}, answer=Answer(objects=(), failure=trajectory.failure), failure=trajectory.failure)
        one, sample = candidates[kept], group.prompt.sample
        turn = trajectory.turns[kept] if trajectory.turns else None
        case = Case(
            text=turn.text if turn else "",
            answer=one.answer,
            target=sample.target,
            image=Frame(sample.height, sample.width),
            view=view_of(turn, group.prompt),
            published=self._config.matching == "binary",
            mask_iou=one.mask_iou or 0.0,
            mask_dice=one.mask_dice or 0.0,
            answered_mask=arrays[0],
            true_mask=arrays[1],
        )
        failures = [trajectory.failure, *(candidate.answer.failure for candidate in candidates)]
        return Score(
            metrics={name: COMPONENTS[name](case) for name in names},
            answer=one.answer,
            mask=one.mask,
            confidence=one.confidence,
            failure=next(filter(None, failures), None),
            candidates=candidates,
            kept=kept,
        )

    def _segment(self, handle: ImageHandle, passes: Sequence[Pass]) -> tuple[Segmentation, bool]:
        segmenter = self._segmenter()
        embedding, cached = segmenter.embed(handle.key, lambda: self._images.get(handle))
        boxes, points, owners = mask_prompts(passes, embedding.height, embedding.width)
        return segmenter.segment(embedding, boxes, points, owners, len(passes), self._config.multimask), cached

    def _segmenter(self) -> Segmenter:
        if self._loaded is None:
            import torch

            from reward_workers.segmenter import Segmenter

            if self._threads:
                torch.set_num_threads(self._threads)
            dtype = torch.bfloat16 if self._device == "cuda" else torch.float32
            self._loaded = Segmenter.load(self._model.segmenter, self._device, dtype, self._config.image_cache)
        return self._loaded


def _true_mask(group: Group) -> np.ndarray:
    """Union of the true masks, (H, W) bool."""
    sample = group.prompt.sample
    if sample.target.count and not sample.target.masks:
        raise ValueError(f"sample '{sample.id}' has no masks: reward without mask_iou, or add masks to the data")
    return masks.decode(masks.union(sample.target.masks, sample.height, sample.width))


def failed_group(group: Group, detail: str) -> ScoredGroup:
    """A group that could not be scored: every trajectory marked, none measured."""
    failure = Failure(kind=FailureKind.SCORER, detail=detail)
    score = Score(metrics={}, answer=Answer(objects=(), failure=failure), failure=failure)
    return ScoredGroup(group=group, scores=(score,) * len(group.trajectories), seconds=0.0, cached=False)


def failed_findings(group: Group, detail: str) -> list[Finding]:
    """Nothing could be said of any of the group's answers."""
    failure = Failure(kind=FailureKind.SCORER, detail=detail)
    return [Finding(confidence=0.0, failure=failure) for _ in group.trajectories]
