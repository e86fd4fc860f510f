"""Guards the reward worker with a real SAM2 of random weights: masks against truth, failures as values, what it says of
an answer without the truth, and when that calls for a closer view."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from perception import masks, metrics
from perception.calibration import FEATURES
from perception.config import LookConfig, ModelConfig, RewardConfig
from perception.images import decode
from perception.types import FailureKind, Group, LookState, Score, Target, Turn, View
from perception.views import picture_size
from reward_workers.components import COMPONENTS, Component
from reward_workers.passes import Pass, confidence_features
from reward_workers.worker import RewardWorker
from synthetic.scenes import Scene, generate
from tests import builders, tiny_segmenter
from tests.builders import failure, group, image, scene_target, target, trajectory, turn, view

MASKED = RewardConfig(name="masked", components={"mask_iou": 1.0, "matched_iou": 1.0, "parsed": 1.0})
PLAIN = RewardConfig(name="plain", components={"think_format": 1.0, "count_ratio": 1.0})
RELOOK = LookConfig(mode="relook", margin=0.1)
TRUST = LookState(weights=(0.0, 4.0, 0, 0, 0, 0, 0, 0), threshold=0.0, explore=0.0)
"""Confidence rises with SAM2's predicted IoU; nothing is below the threshold."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return tiny_segmenter.build(tmp_path_factory.mktemp("segmenter"))


@pytest.fixture(scope="module")
def scene() -> Scene:
    return next(s for s in map(generate, range(100)) if len(s.objects) == 2)


def asked(scene: Scene, texts: list[str], ref: object = None, truth: Target | None = None) -> Group:
    """A group whose policy sees the image at twice its size."""
    handle = image(scene.image)
    prompt = builders.prompt(
        builders.sample("scene 1", scene_target(scene.objects) if truth is None else truth),
        images=(handle if ref is None else replace(handle, ref=ref),),
        answer_height=224,
        answer_width=224,
    )
    return group(*map(trajectory, texts), about=prompt)


def scores(done: Group) -> list[Score]:
    """The scores of a group all of which was measured."""
    found = [one.score for one in done.trajectories]
    assert None not in found
    return found  # type: ignore[return-value]


def made(model: ModelConfig, reward: RewardConfig, look: LookConfig | None = None) -> RewardWorker:
    """In this process."""
    worker = RewardWorker(reward, look or LookConfig(), model, "cpu", 1)
    worker.start()
    return worker


@pytest.fixture(scope="module")
def worker(model: ModelConfig) -> RewardWorker:
    return made(model, MASKED)


@pytest.fixture(scope="module")
def looking(model: ModelConfig) -> RewardWorker:
    return made(model, MASKED, RELOOK)


def answer(scene: Scene) -> str:
    items = [f'{{"bbox_2d": {[2 * v for v in o.box]}, "point_2d": {[2 * v for v in o.point]}}}' for o in scene.objects]
    return f"<think>here</think><answer>[{', '.join(items)}]</answer>"


def box_text(scene: Scene, index: int) -> str:
    return f'<answer>[{{"bbox_2d": {[2 * v for v in scene.objects[index].box]}}}]</answer>'


def test_masks_are_compared_with_the_truth(worker: RewardWorker, scene: Scene) -> None:
    texts = [answer(scene), "gibberish", "<answer>[]</answer>"]
    result = worker.score(asked(scene, texts), want_masks=True)
    good, unparsed, nothing = scores(result)
    assert good.best.answer.objects[0].box == tuple(scene.objects[0].box)  # original pixels
    assert good.metrics["matched_iou"] == 1 and 0 < good.best.confidence <= 1
    assert good.best.mask is not None
    union, answered = np.any([o.mask for o in scene.objects], axis=0), masks.decode(good.best.mask)
    assert good.metrics["mask_iou"] == pytest.approx((answered & union).sum() / (answered | union).sum())
    assert [one.failure and one.failure.kind for one in result.trajectories] == [None, FailureKind.UNPARSED, None]
    assert unparsed.metrics == {"mask_iou": 0, "matched_iou": 0, "parsed": 0}
    assert nothing.metrics == {"mask_iou": 0, "matched_iou": 0, "parsed": 1} and nothing.best.mask is None
    assert worker.score(asked(scene, texts)).cached


def test_with_swapped_channels_the_segmenter_sees_red_as_blue(
    model: ModelConfig, worker: RewardWorker, scene: Scene
) -> None:
    swapped = made(model, replace(MASKED, swapped_channels=True))
    found = [
        scores(one.score(asked(shown, [answer(scene)])))[0].best
        for one, shown in ((swapped, scene), (worker, replace(scene, image=scene.image[..., ::-1])), (worker, scene))
    ]
    assert found[0] == found[1] and found[0].features != found[2].features


def test_ignored_pixels_belong_to_neither_mask(model: ModelConfig, scene: Scene) -> None:
    names = ("mask_iou", "mask_dice", "s_measure", "boundary_iou")
    one, truth = (
        made(model, RewardConfig(name="all", components=dict.fromkeys(names, 1.0))),
        scene_target(scene.objects),
    )
    (plain,) = scores(one.score(asked(scene, [answer(scene)]), want_masks=True))
    assert plain.best.mask is not None
    answered, true = masks.decode(plain.best.mask), np.any([o.mask for o in scene.objects], axis=0)
    left = np.arange(true.shape[1]) < np.nonzero(true.any(0))[0].mean()  # the left half of what is there
    ignored = np.broadcast_to(left, true.shape)
    a, t = answered & ~ignored, true & ~ignored
    assert 0 < t.sum() < true.sum() and 0 < a.sum() < answered.sum()
    (cut,) = scores(one.score(asked(scene, [answer(scene)], truth=replace(truth, ignore=masks.encode(ignored)))))
    assert cut.metrics == {
        "mask_iou": (a & t).sum() / (a | t).sum(),
        "mask_dice": 2 * (a & t).sum() / (a.sum() + t.sum()),
        "s_measure": metrics.s_measure(a, t),
        "boundary_iou": metrics.boundary_iou(a, t),
    }
    assert (cut.best.mask_iou, cut.best.features) == (cut.metrics["mask_iou"], plain.best.features)
    none = replace(truth, ignore=masks.encode(np.zeros_like(true)))
    assert scores(one.score(asked(scene, [answer(scene)], truth=none)))[0].metrics == plain.metrics


def test_an_image_is_encoded_once(model: ModelConfig, scene: Scene) -> None:
    fresh, group = made(model, MASKED), asked(scene, [answer(scene)])
    assert [fresh.score(group).cached for _ in range(2)] == [False, True]


def test_answers_do_not_disturb_each_other(worker: RewardWorker, scene: Scene) -> None:
    """A group's scores are those of its trajectories alone."""
    texts = [answer(scene), box_text(scene, 0), '<answer>[{"point_2d": [90, 90]}]</answer>']
    together = scores(worker.score(asked(scene, texts)))
    for text, joint in zip(texts, together, strict=True):
        (alone,) = scores(worker.score(asked(scene, [text])))
        assert alone.metrics == pytest.approx(joint.metrics)
        assert alone.best.confidence == pytest.approx(joint.best.confidence)


@pytest.mark.parametrize(
    "item",
    [
        '{"bbox_2d": [-900, -900, -800, -800]}',
        '{"bbox_2d": [5, 5, 5, 5]}',
        '{"bbox_2d": [1e5, 0, 1e6, 9]}',
        '{"point_2d": [-3, 5]}',
    ],
)
def test_prompts_outside_the_image_segment_nothing(worker: RewardWorker, scene: Scene, item: str) -> None:
    (one,) = scores(worker.score(asked(scene, [f"<answer>[{item}]</answer>"])))
    assert one.metrics["mask_iou"] == 0 and one.best.confidence == 0


def test_a_dead_engine_is_not_measured_but_a_silent_policy_is(worker: RewardWorker, scene: Scene) -> None:
    spoken = asked(scene, [answer(scene)])
    dead, mute = failure(FailureKind.ENGINE, "the engine died"), failure(FailureKind.EMPTY, "no token")
    mixed = group(*spoken.trajectories, trajectory(failure=dead), trajectory(failure=mute), about=spoken.prompt)
    done, broken, silent = worker.score(mixed).trajectories
    assert done.failure is None and done.score is not None
    assert broken.score is None and broken.failure == dead
    assert silent.score is not None and silent.score.metrics["mask_iou"] == 0 and silent.failure == mute


def test_no_answer_where_nothing_is_there_overlaps_with_nothing(worker: RewardWorker, scene: Scene) -> None:
    """The empty mask of an answer that did not parse equals the empty true one: it counts as 0 all the same, in the
    reward and in what the calibration learns."""
    silent, gibberish = scores(worker.score(asked(scene, ["<answer>[]</answer>", "gibberish"], truth=target())))
    assert (silent.best.mask_iou, silent.best.mask_dice, silent.metrics["mask_iou"]) == (1, 1, 1)
    assert (gibberish.best.mask_iou, gibberish.best.mask_dice, gibberish.metrics["mask_iou"]) == (0, 0, 0)
    lost = trajectory(failure=failure(FailureKind.EMPTY, "no token"))
    (mute,) = scores(worker.score(group(lost, about=asked(scene, [], truth=target()).prompt)))
    assert mute.best.mask_iou == 0


def test_sam2_is_not_loaded_where_nothing_needs_it(scene: Scene) -> None:
    plain = made(ModelConfig(path="unused", segmenter="/nowhere"), PLAIN)
    (one,) = scores(plain.score(asked(scene, [answer(scene)])))
    assert one.metrics == {"think_format": 1, "count_ratio": 1}
    with pytest.raises(FileNotFoundError, match="/nowhere"):  # the task's own metric compares masks
        plain.score(asked(scene, [answer(scene)]), held_out=True)


def test_held_out_answers_are_measured_by_their_task(worker: RewardWorker, scene: Scene) -> None:
    held_out = worker.score(asked(scene, [answer(scene)]), held_out=True)
    assert list(scores(held_out)[0].metrics) == ["mask_iou"]
    about = asked(scene, [answer(scene)])
    ground, count = (replace(about, prompt=replace(about.prompt, task=name)) for name in ("ground", "count"))
    assert scores(worker.score(ground, held_out=True))[0].metrics == {"box_accuracy": 1, "box_iou": 1}
    assert scores(worker.score(count, held_out=True))[0].metrics == {"count_exact": 1, "count_ratio": 1}


def test_a_component_that_is_not_finite_marks_the_trajectory_by_name(
    model: ModelConfig, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMPONENTS._entries, "endless", Component(lambda case: float("inf"), frozenset()))
    one = made(model, RewardConfig(name="mine", components={"endless": 1.0, "parsed": 1.0}))
    (done,) = one.score(asked(scene, [answer(scene)])).trajectories
    assert done.score is None and done.excluded
    assert done.failure is not None and done.failure.detail == "component endless of sample 'scene 1' is inf"


def looked(scene: Scene, first: str, second: str, shown: View, n: int = 1) -> Group:
    before = asked(scene, [first] * n)
    later = (replace(one, turns=(*one.turns, turn(second, view=shown))) for one in before.trajectories)
    return group(*later, about=before.prompt)


SHOWN = view(10, 20, 66, 76)
"""56 px of the image at 112."""


def test_a_doubtful_answer_calls_for_its_closer_view(looking: RewardWorker, scene: Scene) -> None:
    three = asked(scene, [box_text(scene, 0), "<answer>[]</answer>", "gibberish"])
    doubtful, empty, unread = looking.examine(three, replace(TRUST, threshold=1.0))
    x1, y1, x2, y2 = scene.objects[0].box
    assert doubtful.view is not None
    left, top, right, bottom = doubtful.view
    assert left <= x1 and top <= y1 and right >= x2 and bottom >= y2
    picture = decode(doubtful.picture)
    assert picture.shape == (*picture_size(doubtful.view, RELOOK.pixels), 3) == (112, 112, 3)
    assert empty.view is None and unread.view is None
    assert all(finding.view is None for finding in looking.examine(three, TRUST))


def test_the_trigger_can_be_always_or_never(model: ModelConfig, scene: Scene) -> None:
    one = asked(scene, [box_text(scene, 0)])
    always = made(model, MASKED, replace(RELOOK, trigger="always"))
    never = made(model, MASKED, replace(RELOOK, trigger="never"))
    assert always.examine(one, TRUST)[0].view is not None
    assert never.examine(one, replace(TRUST, threshold=1.0))[0].view is None


def explored(looking: RewardWorker, answers: Group, explore: float) -> list[bool]:
    return [one.view is not None for one in looking.examine(answers, replace(TRUST, explore=explore))]


def test_confident_answers_are_explored_at_the_configured_rate_and_repeatably(
    looking: RewardWorker, scene: Scene
) -> None:
    hundred = asked(scene, [box_text(scene, 0)] * 100)
    drawn = explored(looking, hundred, 0.2)
    assert 10 <= sum(drawn) <= 30 and drawn == explored(looking, hundred, 0.2)


def test_a_later_pass_is_explored_independently_of_the_first(looking: RewardWorker, scene: Scene) -> None:
    """About 60 of 200 answers are looked at again at explore=0.3, and of these again about 18, not all."""
    once = asked(scene, [box_text(scene, 0)] * 200)
    twice = looked(scene, box_text(scene, 0), '<answer>[{"bbox_2d": [20, 40, 80, 100]}]</answer>', SHOWN, n=200)
    first, second = explored(looking, once, 0.3), explored(looking, twice, 0.3)
    assert 40 <= sum(first) <= 80 and 40 <= sum(second) <= 80
    again = sum(a and b for a, b in zip(first, second, strict=True))
    assert again / sum(first) == pytest.approx(0.3, abs=0.15)
    # the first pass draws from (seed of the prompt, index of the sample), as it always did
    assert first == [np.random.default_rng((0, index)).random() < 0.3 for index in range(200)]


def test_what_is_said_of_an_answer_does_not_depend_on_the_truth(looking: RewardWorker, scene: Scene) -> None:
    two = asked(scene, [box_text(scene, 0), box_text(scene, 1)])
    blind = replace(two, prompt=replace(two.prompt, sample=replace(two.prompt.sample, target=target())))
    doubt = replace(TRUST, threshold=1.0)
    assert looking.examine(two, doubt) == looking.examine(blind, doubt)
    known, unknown = (scores(looking.score(one, look=TRUST)) for one in (two, blind))
    assert [(s.kept, s.best.confidence, s.best.answer) for s in known] == [
        (s.kept, s.best.confidence, s.best.answer) for s in unknown
    ]
    assert [s.metrics for s in known] != [s.metrics for s in unknown]


def test_a_later_answer_is_read_in_its_views_frame(looking: RewardWorker, scene: Scene) -> None:
    both = looked(scene, box_text(scene, 0), '<answer>[{"bbox_2d": [20, 40, 80, 100]}]</answer>', SHOWN)
    later = replace(TRUST, weights=(0.0, 0, 0, 0, 0, 0, 9.0, 0))  # the later one is always believed
    (score,) = scores(looking.score(both, look=later))
    assert score.kept == 1 and score.best.answer.objects[0].box == (20, 40, 50, 70)
    first, second = score.candidates
    assert first.answer.objects[0].box == tuple(scene.objects[0].box) and second is score.best
    assert score.metrics["mask_iou"] == second.mask_iou != first.mask_iou
    earlier = replace(later, weights=(0.0, 0, 0, 0, 0, 0, -9.0, 0))
    (other,) = scores(looking.score(both, look=earlier))
    assert other.kept == 0 and other.metrics["mask_iou"] == first.mask_iou
    assert other.metrics["matched_iou"] == 1  # mean over the one pair


def test_a_second_pass_that_does_not_parse_is_marked_and_never_kept(looking: RewardWorker, scene: Scene) -> None:
    (one,) = looking.score(looked(scene, box_text(scene, 0), "nonsense", SHOWN), look=TRUST).trajectories
    assert one.score is not None and one.score.kept == 0 and one.score.best.answer.failure is None
    assert one.failure is not None and one.failure.kind is FailureKind.UNPARSED


def features(one: Pass) -> dict[str, float]:
    return dict(zip(FEATURES, confidence_features([one], np.array([[0.1, 0.2, 0.3]]))[0].tolist(), strict=True))


def test_confidence_features_by_hand() -> None:
    boxed, empty = builders.answer((1, 2, 3, 4)), builders.answer()
    said: Turn = turn(token_ids=(5, 6, 7), logprobs=(-1.0, -2.0, -6.0))
    first = {"predicted_iou": 0.1, "stability": 0.2, "agreement": 0.3}
    first |= {"certainty": -3.0, "empty": 0, "later": 0, "withdrawn": 0}  # the mean of the three log-probs
    assert features(Pass(boxed, said, 0)) == first
    assert features(Pass(empty, said, 0)) == first | {"empty": 1}
    assert features(Pass(boxed, said, 1)) == first | {"later": 1}
    assert features(Pass(empty, said, 2)) == first | {"later": 1, "withdrawn": 1}
    unread = builders.answer(failed=True)
    assert features(Pass(unread, said, 0)) == first and features(Pass(unread, said, 1)) == first | {"later": 1}
    assert features(Pass(unread, None, 0)) == first | {"certainty": 0.0}
