"""Guards that no mask is decoded twice: what was examined is scored by the same mask, a bounded number of answers is
kept, and nothing after the score. SAM2 is real, of random weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from perception import masks
from perception.config import LookConfig, ModelConfig, RewardConfig
from perception.types import FailureKind, Group, LookState, MaskPrompt
from reward_workers.mask_cache import MaskCache
from reward_workers.segmenter import Segmentation
from reward_workers.worker import RewardWorker
from tests import builders, tiny_segmenter
from tests.builders import failure, group, image, lost, noise, target, trajectory, turn, view

BOX, OTHER = '{"bbox_2d": [10, 12, 60, 70]}', '{"bbox_2d": [30, 5, 100, 90]}'
POINT, BOTH = '{"point_2d": [20, 80]}', '{"bbox_2d": [5, 60, 50, 108], "point_2d": [20, 80]}'
OUTSIDE = '{"bbox_2d": [-900, -900, -800, -800]}'
TRUTH = target([(10, 12, 60, 70)], shapes=[masks.encode(builders.rectangle(10, 12, 60, 70, 112, 112))])
DOUBT = LookState(weights=(0.0, 4.0, 0, 0, 0, 0, 0, 0), threshold=1.0, explore=0.0)


def said(*items: str) -> str:
    return f"<answer>[{', '.join(items)}]</answer>"


FAMILIES = {
    "boxes": ([said(BOX), said(OTHER)], 2),
    "points": ([said(POINT), said(POINT)], 1),
    "box and point": ([said(BOTH), said(BOTH), said(BOX)], 2),
    "several objects": ([said(BOX, OTHER, POINT), said(OTHER, BOX), said(BOX)], 3 + 2 + 1),
    "nothing to draw": ([said(), "gibberish", said(OUTSIDE)], 0),
    "all together": ([said(BOX), "gibberish", said(BOTH, POINT), said(), said(BOX), said(OUTSIDE, OTHER)], 1 + 2 + 1),
}
"""Answers, and the masks of the distinct ones."""


class Counted:
    """A reward worker in this process, and the masks that its SAM2 decoded."""

    def __init__(self, model: ModelConfig, mask_cache: int) -> None:
        reward = RewardConfig(name="masked", components={"mask_iou": 1.0, "parsed": 1.0}, mask_cache=mask_cache)
        self.worker = RewardWorker(reward, LookConfig(mode="relook", margin=0.1), model, "cpu", 1)
        self.worker.start()
        self.decoded = 0
        segmenter = self.worker._segmenter()
        decode = segmenter.decode

        def counting(embedding: object, prompts: list[MaskPrompt], multimask: bool = False) -> object:
            self.decoded += len(prompts)
            return decode(embedding, prompts, multimask)  # type: ignore[arg-type]

        segmenter.decode = counting  # type: ignore[assignment, method-assign]

    @property
    def kept(self) -> int:
        assert self.worker._masks is not None
        return len(self.worker._masks)


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Counted, Counted]:
    model = tiny_segmenter.build(tmp_path_factory.mktemp("segmenter"))
    return Counted(model, 64), Counted(model, 0)


@pytest.fixture
def one(workers: tuple[Counted, Counted]) -> Counted:
    """Keeps masks; every test leaves it without any."""
    workers[0].decoded = 0
    return workers[0]


@pytest.fixture
def plain(workers: tuple[Counted, Counted]) -> Counted:
    """Keeps none."""
    workers[1].decoded = 0
    return workers[1]


def asked(texts: list[str], seed: int = 0) -> Group:
    about = builders.prompt(builders.sample("one", TRUTH), images=(image(noise(seed)),))
    return group(*map(trajectory, texts), about=about)


def part(whole: Group, *places: int) -> Group:
    return replace(whole, trajectories=tuple(whole.trajectories[place] for place in places))


def same(one: Group, other: Group) -> None:
    """Every mask and overlap to the bit; what SAM2 says of a mask to its last digits, which depend on the batch."""
    for a, b in zip(one.trajectories, other.trajectories, strict=True):
        assert (a.failure, a.score is None) == (b.failure, b.score is None)
        if a.score is not None and b.score is not None:
            assert a.score.kept == b.score.kept and a.score.metrics == b.score.metrics
            for left, right in zip(a.score.candidates, b.score.candidates, strict=True):
                assert (left.answer, left.mask, left.mask_iou) == (right.answer, right.mask, right.mask_iou)
                assert left.features == pytest.approx(right.features, abs=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("alone", [False, True], ids=["together", "one by one"])
def test_an_answer_is_decoded_once_for_both(one: Counted, plain: Counted, name: str, alone: bool) -> None:
    texts, distinct = FAMILIES[name]
    whole = asked(texts)
    for places in [[i] for i in range(len(texts))] if alone else [range(len(texts))]:
        found = one.worker.examine(part(whole, *places), DOUBT)
        other = plain.worker.examine(part(whole, *places), DOUBT)
        assert [each.view for each in found] == [each.view for each in other]
        assert [each.picture for each in found] == [each.picture for each in other]
    assert one.decoded == distinct
    scored = one.worker.score(whole, want_masks=True, look=DOUBT)
    assert one.decoded == distinct and one.kept == 0
    same(scored, plain.worker.score(whole, want_masks=True, look=DOUBT))
    assert plain.decoded == 2 * sum(text.count("{") - text.count("-900, -900") for text in texts)


def test_of_several_passes_the_new_ones_are_decoded(one: Counted, plain: Counted) -> None:
    """Four answers: one looked at again and changed, one confirmed, one that failed in the engine, one that is silent.
    The third answer changes its mind a second time."""
    first = asked([said(BOX), said(OTHER), said(POINT)])
    one.worker.examine(first, DOUBT)
    assert one.decoded == 3
    whole_image = view(0, 0, 112, 112)
    looked = [
        replace(each, turns=(*each.turns, turn(text, view=whole_image)))
        for each, text in zip(first.trajectories, [said(BOTH), said(OTHER), said(BOX)], strict=True)
    ]
    one.worker.examine(part(group(*looked, about=first.prompt), 2), DOUBT)
    assert one.decoded == 3, "the first answer of its sibling"
    third = replace(looked[2], turns=(*looked[2].turns, turn(said(POINT, BOX), view=whole_image)))
    silent = trajectory(failure=failure(FailureKind.EMPTY, "no token"))
    done = group(*looked[:2], third, lost(), silent, about=first.prompt)
    scored = one.worker.score(done, want_masks=True, look=DOUBT)
    assert one.decoded == 3 + 1 + 2 and one.kept == 0
    same(scored, plain.worker.score(done, want_masks=True, look=DOUBT))
    assert [each.score is None for each in scored.trajectories] == [False, False, False, True, False]


def test_another_image_has_masks_of_its_own(one: Counted) -> None:
    here, there = asked([said(BOX)], seed=0), asked([said(BOX)], seed=1)
    one.worker.examine(here, DOUBT)
    one.worker.score(there, look=DOUBT)
    assert (one.decoded, one.kept) == (2, 1)
    one.worker.score(here, look=DOUBT)
    assert (one.decoded, one.kept) == (2, 0)


def test_where_nothing_is_examined_a_group_is_decoded_as_it_is(one: Counted) -> None:
    """Bit for bit what it was: equal answers stand beside one another in the batch."""
    one.worker.score(asked([said(BOX), said(BOX), said(OTHER)]))
    assert (one.decoded, one.kept) == (3, 0)


def boxes(count: int) -> list[MaskPrompt]:
    return [MaskPrompt(box=(0.0, 0.0, 1.0 + i, 1.0)) for i in range(count)]


def drawn(prompts: object, owners: np.ndarray, answers: int) -> Segmentation:
    """An answer's mask and features are its number of prompts."""
    count = np.bincount(owners, minlength=answers)
    return Segmentation(torch.from_numpy(count)[:, None, None].expand(answers, 4, 5).clone(), np.stack([count] * 3, 1))


@pytest.mark.parametrize("capacity", [1, 3, 8])
def test_the_cache_is_bounded_and_the_newest_answers_stay(capacity: int) -> None:
    cache = MaskCache(capacity)
    for one in boxes(5):
        cache.segment("image", [one], np.zeros(1, np.int64), 1, drawn)
    assert len(cache) == min(capacity, 5)
    asked: list[int] = []

    def counted(prompts: list[MaskPrompt], owners: np.ndarray, answers: int) -> Segmentation:
        asked.append(answers)
        return drawn(prompts, owners, answers)

    cache.segment("image", boxes(5), np.arange(5), 5, counted, last=True)
    assert sum(asked) == 5 - min(capacity, 5) and len(cache) == 0


def test_what_is_kept_is_the_same_array_and_holds_no_other() -> None:
    cache = MaskCache(8)
    made = cache.segment("image", [*boxes(2), *boxes(1)], np.array([0, 0, 2]), 3, drawn)
    assert made.masks[:, 0, 0].tolist() == [2, 0, 1] and made.features[:, 0].tolist() == [2, 0, 1]
    assert {mask.untyped_storage().nbytes() for mask, _ in cache._kept.values()} == {made.masks[0].nbytes}

    def never(*_: object) -> Segmentation:
        raise AssertionError("decoded twice")

    again = cache.segment("image", [*boxes(1), *boxes(2)], np.array([0, 1, 1]), 2, never)
    assert torch.equal(again.masks, made.masks[[2, 0]]) and np.array_equal(again.features, made.features[[2, 0]])
