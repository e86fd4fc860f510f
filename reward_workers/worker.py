"""Reward worker: measures a group's completions, with SAM2 where masks are needed. Runs as a Ray actor."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from perception import images, masks, views
from perception.calibration import confidence, most_confident
from perception.config import LookConfig, ModelConfig, RewardConfig
from perception.frames import Frame
from perception.images import ImageCache
from perception.tasks import TASKS
from perception.types import Candidate, Failure, FailureKind, Finding, Group, LookState, Prompt, Score, Trajectory
from reward_workers.components import Case, Component, held_out_terms, needed_truth, needs, reward_terms
from reward_workers.passes import Pass, confidence_features, judge, mask_prompts, read_passes, view_of
from runtime.objects import fetch
from runtime.tracing import Traced

if TYPE_CHECKING:
    from reward_workers.segmenter import Segmentation, Segmenter


class RewardWorker(Traced):
    """SAM2 (and torch) is loaded only where a component or a caller asks for masks."""

    def __init__(
        self, config: RewardConfig, look: LookConfig, model: ModelConfig, device: str, threads: int, share: float = 1.0
    ) -> None:
        """`threads`: intra-op threads of torch, 0 for its own default. `share`: of the GPU's memory, its limit."""
        self._gpu_share = share
        self._config, self._look, self._model, self._device, self._threads = config, look, model, device, threads
        self._images = ImageCache(fetch)
        self._loaded: Segmenter | None = None

    def start(self) -> float:
        """Load what the configured components need; returns the seconds that took."""
        started = time.perf_counter()
        self._terms = reward_terms(self._config)
        self._compares = "masks" in needed_truth(self._config)
        if self._compares or self._look.mode == "relook":
            self._segmenter()
        return time.perf_counter() - started

    def score(
        self, group: Group, want_masks: bool = False, held_out: bool = False, look: LookState | None = None
    ) -> Group:
        """The group with a score on every trajectory: by the reward's components, or `held_out` by its task's metrics.

        Of several passes the most confident one counts, by the calibration in `look`. `want_masks` adds the answers'
        masks. Where the engine failed nothing is measured; a group of nothing else comes back as it is. Pixels that the
        truth says to ignore belong to no mask that is compared. Raises ValueError where masks are to be compared and
        the sample has none, DataError when the image cannot be read.
        """
        prompt = group.prompt
        if all(trajectory.excluded for trajectory in group.trajectories):
            return group
        terms = held_out_terms(TASKS[prompt.task].metrics) if held_out else self._terms
        compares = "masks" in needs(terms) if held_out else self._compares
        read = [read_passes(trajectory, prompt) for trajectory in group.trajectories]
        passes = [one for own in read for one in own]
        judges = look is not None and "masks" in prompt.sample.target.known
        truth = _true_mask(prompt) if compares or judges else None
        segmentation, cached = None, False
        if compares or want_masks or look is not None:
            segmentation, cached = self._segment(prompt, passes, look, last=True)
        ignored = prompt.sample.target.ignore
        if truth is not None and segmentation is not None and ignored is not None:
            counted = ~masks.decode(ignored)
            truth, segmentation = truth & counted, segmentation.within(counted)
        judged = judge(passes, segmentation, truth, look, want_masks)

        def arrays(first: int, kept: int) -> tuple[np.ndarray, np.ndarray]:
            assert segmentation is not None and truth is not None, "masks are compared where they are needed"
            return segmentation.mask(first + kept), truth

        scored, first = [], 0
        for trajectory, own in zip(group.trajectories, read, strict=True):
            candidates = tuple(judged[first : first + len(own)])
            scored.append(_scored(prompt, trajectory, candidates, terms, partial(arrays, first)))
            first += len(own)
        return replace(group, trajectories=tuple(scored), cached=cached)

    def examine(self, group: Group, look: LookState) -> list[Finding]:
        """How far the last answer of each trajectory can be believed, without any truth, and the view it calls for.

        Every trajectory has a turn. Raises DataError when the image cannot be read.
        """
        prompt = group.prompt
        image = self._images.get(prompt.images[0])
        last = [read_passes(trajectory, prompt)[-1] for trajectory in group.trajectories]
        segmentation, _ = self._segment(prompt, last, look)
        sure = confidence(look.weights, confidence_features(last, segmentation.features)).tolist()
        findings = []
        for row, (trajectory, one) in enumerate(zip(group.trajectories, last, strict=True)):
            # Every pass draws from a seed of its own: else an explored first look would imply an explored second one.
            seed = (prompt.seed, trajectory.index, *((one.place,) if one.place else ()))
            rect, picture = self._due(one, sure[row], image.shape[:2], look, seed), b""
            if rect is not None:
                picture = images.encode(views.picture(image, rect, segmentation.mask(row), self._look.pixels))
            findings.append(Finding(confidence=sure[row], view=rect, picture=picture))
        return findings

    def _due(
        self, one: Pass, sure: float, size: tuple[int, int], look: LookState, seed: Sequence[int]
    ) -> views.Rect | None:
        """The rectangle to look at again, if that is due. An explored look is drawn from `seed`."""
        config = self._look
        if config.trigger == "never" or one.answer.failure is not None:
            return None
        doubtful = config.trigger == "always" or not look.weights or sure < look.threshold
        if not doubtful and not np.random.default_rng(seed).random() < look.explore:
            return None
        return views.closer_look(one.answer.objects, *size, config.margin, config.smallest, config.min_zoom)

    def _segment(
        self, prompt: Prompt, passes: Sequence[Pass], look: LookState | None, last: bool = False
    ) -> tuple[Segmentation, bool]:
        """The passes' masks, and whether the image's embedding was already there. Where answers are examined (`look`),
        their masks are kept until they are wanted for the `last` time."""
        segmenter, handle = self._segmenter(), prompt.images[0]
        channels = [2, 1, 0] if self._config.swapped_channels else slice(None)
        embedding, cached = segmenter.embed(handle.key, lambda: self._images.get(handle)[..., channels])
        prompts, owners = mask_prompts(passes, prompt.task, embedding.height, embedding.width)
        decode = partial(segmenter.segment, embedding, multimask=self._config.multimask)
        if look is None or self._masks is None or not passes:
            return decode(prompts, owners, len(passes)), cached
        return self._masks.segment(handle.key, prompts, owners, len(passes), decode, last), cached

    def _segmenter(self) -> Segmenter:
        if self._loaded is None:
            import torch

            from reward_workers.mask_cache import MaskCache
            from reward_workers.segmenter import Segmenter

            if self._threads:
                torch.set_num_threads(self._threads)
            if self._device == "cuda" and self._gpu_share < 1:
                torch.cuda.set_per_process_memory_fraction(self._gpu_share)
            dtype = torch.bfloat16 if self._device == "cuda" else torch.float32
            self._masks = MaskCache(self._config.mask_cache) if self._config.mask_cache else None
            self._loaded = Segmenter.load(self._model.segmenter, self._device, dtype, self._config.image_cache)
        return self._loaded


def _scored(
    prompt: Prompt,
    trajectory: Trajectory,
    candidates: tuple[Candidate, ...],
    terms: Mapping[str, Component],
    arrays: Callable[[int], tuple[np.ndarray, np.ndarray]],
) -> Trajectory:
    """`arrays` makes the mask of a candidate and the true one."""
    if not candidates:
        return trajectory
    kept = most_confident(candidates)
    one, sample = candidates[kept], prompt.sample
    turn = trajectory.turns[kept] if trajectory.turns else None
    case = Case(
        text=turn.text if turn else "",
        answer=one.answer,
        target=sample.target,
        image=Frame(sample.height, sample.width),
        view=view_of(turn, prompt),
        mask_iou=one.mask_iou or 0.0,
        mask_dice=one.mask_dice or 0.0,
        masks=partial(arrays, kept),
    )
    metrics = {name: term(case) for name, term in terms.items()}
    if wrong := [name for name, value in metrics.items() if not math.isfinite(value)]:
        return _failed(trajectory, f"component {wrong[0]} of sample '{sample.id}' is {metrics[wrong[0]]}")
    failures = [trajectory.failure, *(candidate.answer.failure for candidate in candidates)]
    score = Score(metrics=metrics, candidates=candidates, kept=kept)
    return replace(trajectory, score=score, failure=next(filter(None, failures), None))


def _true_mask(prompt: Prompt) -> np.ndarray:
    """Union of the true masks, (H, W) bool."""
    sample = prompt.sample
    if "masks" not in sample.target.known:
        raise ValueError(f"sample '{sample.id}' has no masks: reward without mask_iou, or add masks to the data")
    return masks.decode(masks.union(sample.target.masks, sample.height, sample.width))


def failed_group(group: Group, detail: str) -> Group:
    """A group that could not be scored: every trajectory marked, none measured."""
    return replace(group, trajectories=tuple(_failed(trajectory, detail) for trajectory in group.trajectories))


def _failed(trajectory: Trajectory, detail: str) -> Trajectory:
    failure = trajectory.failure if trajectory.excluded else Failure(kind=FailureKind.SCORER, detail=detail)
    return replace(trajectory, failure=failure, score=None)


def failed_findings(group: Group, detail: str) -> list[Finding]:
    """A failed finding for every answer of the group."""
    failure = Failure(kind=FailureKind.SCORER, detail=detail)
    return [Finding(confidence=0.0, failure=failure) for _ in group.trajectories]
