"""Guards the reward worker with real SAM2 and real Ray: masks against truth, caching, failures as values, restarts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import ray
import torch
from omegaconf import OmegaConf
from ray.exceptions import RayActorError
from safetensors.torch import save_file

from launch.warm_start.segmenter import mini_config
from perception import masks
from perception.config import LookConfig, ModelConfig, PlacementConfig, RewardConfig
from perception.images import content_key, decode
from perception.scenes import Scene, generate
from perception.types import (
    Failure,
    FailureKind,
    Group,
    ImageHandle,
    LookState,
    Prompt,
    Sample,
    Target,
    Trajectory,
    Turn,
    View,
)
from reward_workers.pool import RewardError, RewardPool
from reward_workers.segmenter import build
from reward_workers.worker import RewardWorker
from runtime import objects

MASKED = RewardConfig(name="masked", components={"mask_iou": 1.0, "matched_iou": 1.0, "parsed": 1.0}, timeout_s=240)
PLAIN = RewardConfig(name="plain", components={"think_format": 1.0, "count_ratio": 1.0}, timeout_s=240)
PLACEMENT = PlacementConfig(name="test", device="cpu", reward_cpus=0.5, threads=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A SAM2 directory with random weights."""
    folder = tmp_path_factory.mktemp("segmenter")
    config = mini_config()
    torch.manual_seed(0)
    OmegaConf.save(config, folder / "config.yaml")
    state = build(config).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    return ModelConfig(path="unused", segmenter=str(folder))


@pytest.fixture(scope="module")
def scene() -> Scene:
    return next(s for s in map(generate, range(100)) if len(s.objects) == 2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()


def truth(scene: Scene) -> Target:
    return Target(
        boxes=np.array([o.box for o in scene.objects], np.float32),
        points=np.array([o.point for o in scene.objects], np.float32),
        masks=tuple(masks.encode(o.mask) for o in scene.objects),
    )


def asked(scene: Scene, texts: list[str], ref: object = None, target: Target | None = None) -> Group:
    """A group whose policy sees the image at twice its size."""
    data = cv2.imencode(".png", scene.image[..., ::-1])[1].tobytes()
    image = ImageHandle(key=content_key(data), height=112, width=112, ref=data if ref is None else ref)
    sample = Sample(
        id="scene 1",
        image_path="",
        height=112,
        width=112,
        question="all of them",
        task="segment",
        target=truth(scene) if target is None else target,
    )
    prompt = Prompt(sample=sample, token_ids=(1,), images=(image,), answer_height=224, answer_width=224, seed=0)
    return Group(prompt=prompt, trajectories=tuple(trajectory(i, text) for i, text in enumerate(texts)))


def trajectory(index: int, text: str) -> Trajectory:
    turn = Turn(input_ids=(), images=(), token_ids=(), logprobs=(), versions=(), text=text, finish_reason="stop")
    return Trajectory(index=index, turns=(turn,))


def answer(scene: Scene) -> str:
    items = [f'{{"bbox_2d": {[2 * v for v in o.box]}, "point_2d": {[2 * v for v in o.point]}}}' for o in scene.objects]
    return f"<think>here</think><answer>[{', '.join(items)}]</answer>"


def test_an_image_that_the_object_store_does_not_give_is_named(
    cluster: None, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = ray.remote(num_cpus=0.1)(lambda: time.sleep(60)).remote()
    (image,) = asked(scene, [], ref=never).prompt.images
    monkeypatch.setattr(objects, "FETCH_TIMEOUT_S", 0.2)
    with pytest.raises(RuntimeError, match=f"image {image.key} did not come from Ray's store in 0.2 s"):
        objects.fetch(image)
    ray.cancel(never, force=True)


def test_masks_are_compared_with_the_truth(model: ModelConfig, scene: Scene) -> None:
    worker = RewardWorker(MASKED, LookConfig(), model, "cpu", 1)
    worker.start()
    texts = [answer(scene), "gibberish", "<answer>[]</answer>"]
    result = worker.score(asked(scene, texts), want_masks=True)
    good, unparsed, nothing = result.scores
    assert good.answer.objects[0].box == tuple(scene.objects[0].box)  # original pixels
    assert good.metrics["matched_iou"] == 1 and good.failure is None and 0 < good.confidence <= 1
    assert good.mask is not None
    union, answered = np.any([o.mask for o in scene.objects], axis=0), masks.decode(good.mask)
    assert good.metrics["mask_iou"] == pytest.approx((answered & union).sum() / (answered | union).sum())
    assert unparsed.failure is not None and unparsed.failure.kind == FailureKind.UNPARSED
    assert unparsed.metrics == {"mask_iou": 0, "matched_iou": 0, "parsed": 0}
    assert nothing.metrics == {"mask_iou": 0, "matched_iou": 0, "parsed": 1} and nothing.mask is None
    assert not result.cached and worker.score(asked(scene, texts)).cached
    assert worker.stats()["cache_hits"] == 1


def test_answers_do_not_disturb_each_other(model: ModelConfig, scene: Scene) -> None:
    """A group's scores are those of its trajectories alone."""
    worker = RewardWorker(MASKED, LookConfig(), model, "cpu", 1)
    one_object = f'<answer>[{{"bbox_2d": {[2 * v for v in scene.objects[0].box]}}}]</answer>'
    texts = [answer(scene), one_object, '<answer>[{"point_2d": [90, 90]}]</answer>']
    together = worker.score(asked(scene, texts))
    for text, joint in zip(texts, together.scores, strict=True):
        alone = worker.score(asked(scene, [text])).scores[0]
        assert alone.metrics == pytest.approx(joint.metrics)
        assert alone.confidence == pytest.approx(joint.confidence)


@pytest.mark.parametrize(
    "item",
    [
        '{"bbox_2d": [-900, -900, -800, -800]}',
        '{"bbox_2d": [5, 5, 5, 5]}',
        '{"bbox_2d": [1e5, 0, 1e6, 9]}',
        '{"point_2d": [-3, 5]}',
    ],
)
def test_prompts_outside_the_image_segment_nothing(model: ModelConfig, scene: Scene, item: str) -> None:
    result = RewardWorker(MASKED, LookConfig(), model, "cpu", 1).score(asked(scene, [f"<answer>[{item}]</answer>"]))
    assert result.scores[0].metrics["mask_iou"] == 0 and result.scores[0].confidence == 0


def test_a_dead_engine_is_not_measured_but_a_silent_policy_is(model: ModelConfig, scene: Scene) -> None:
    group = asked(scene, [answer(scene)])
    dead = Trajectory(index=1, turns=(), failure=Failure(kind=FailureKind.ENGINE, detail="the engine died"))
    mute = Trajectory(index=2, turns=(), failure=Failure(kind=FailureKind.EMPTY, detail="no token"))
    group = Group(prompt=group.prompt, trajectories=(*group.trajectories, dead, mute))
    spoken, broken, silent = RewardWorker(MASKED, LookConfig(), model, "cpu", 1).score(group).scores
    assert spoken.failure is None
    assert broken.metrics == {} and broken.failure == dead.failure
    assert silent.metrics["mask_iou"] == 0 and silent.failure == mute.failure


def test_sam2_is_not_loaded_where_nothing_needs_it(scene: Scene) -> None:
    nowhere = ModelConfig(path="unused", segmenter="/nowhere")
    worker = RewardWorker(PLAIN, LookConfig(), nowhere, "cpu", 1)
    worker.start()
    assert worker.score(asked(scene, [answer(scene)])).scores[0].metrics == {"think_format": 1, "count_ratio": 1}
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        worker.score(asked(scene, [answer(scene)]), names=("mask_iou",))


RELOOK = LookConfig(mode="relook", margin=0.1)
TRUST = LookState(weights=(0.0, 4.0, 0, 0, 0, 0, 0, 0), threshold=0.0, explore=0.0)
"""Confidence rises with SAM2's predicted IoU; nothing is below the threshold."""


def box_text(scene: Scene, index: int) -> str:
    return f'<answer>[{{"bbox_2d": {[2 * v for v in scene.objects[index].box]}}}]</answer>'


def looked(scene: Scene, first: str, second: str, view: View) -> Group:
    group = asked(scene, [first])
    (one,) = group.trajectories
    later = replace(one.turns[0], text=second, view=view)
    return Group(prompt=group.prompt, trajectories=(replace(one, turns=(*one.turns, later)),))


def test_a_doubtful_answer_calls_for_its_closer_view(model: ModelConfig, scene: Scene) -> None:
    worker = RewardWorker(MASKED, RELOOK, model, "cpu", 1)
    group = asked(scene, [box_text(scene, 0), "<answer>[]</answer>", "gibberish"])
    doubtful, empty, unread = worker.examine(group, replace(TRUST, threshold=1.0))
    x1, y1, x2, y2 = scene.objects[0].box
    assert doubtful.view is not None
    left, top, right, bottom = doubtful.view
    assert left <= x1 and top <= y1 and right >= x2 and bottom >= y2
    picture = decode(doubtful.picture)
    assert picture.shape == (doubtful.picture_height, doubtful.picture_width, 3) == (112, 112, 3)
    assert empty.view is None and unread.view is None
    assert all(finding.view is None for finding in worker.examine(group, TRUST))


def test_the_trigger_can_be_always_or_never(model: ModelConfig, scene: Scene) -> None:
    group = asked(scene, [box_text(scene, 0)])
    always = RewardWorker(MASKED, replace(RELOOK, trigger="always"), model, "cpu", 1)
    never = RewardWorker(MASKED, replace(RELOOK, trigger="never"), model, "cpu", 1)
    assert always.examine(group, TRUST)[0].view is not None
    assert never.examine(group, replace(TRUST, threshold=1.0))[0].view is None


def test_confident_answers_are_explored_at_the_configured_rate_and_repeatably(model: ModelConfig, scene: Scene) -> None:
    worker = RewardWorker(MASKED, RELOOK, model, "cpu", 1)
    group = asked(scene, [box_text(scene, 0)] * 200)
    first, again = (worker.examine(group, replace(TRUST, explore=0.2)) for _ in range(2))
    drawn = [finding.view is not None for finding in first]
    assert 20 <= sum(drawn) <= 60 and drawn == [finding.view is not None for finding in again]


def test_what_is_said_of_an_answer_does_not_depend_on_the_truth(model: ModelConfig, scene: Scene) -> None:
    worker = RewardWorker(MASKED, RELOOK, model, "cpu", 1)
    group = asked(scene, [box_text(scene, 0), box_text(scene, 1)])
    swapped = Target(boxes=np.zeros((0, 4), np.float32), points=np.zeros((0, 2), np.float32))
    blind = replace(group, prompt=replace(group.prompt, sample=replace(group.prompt.sample, target=swapped)))
    doubt = replace(TRUST, threshold=1.0)
    assert worker.examine(group, doubt) == worker.examine(blind, doubt)
    known, unknown = worker.score(group, look=TRUST).scores, worker.score(blind, look=TRUST).scores
    assert [(s.kept, s.confidence, s.answer) for s in known] == [(s.kept, s.confidence, s.answer) for s in unknown]
    assert [s.metrics for s in known] != [s.metrics for s in unknown]


def test_a_later_answer_is_read_in_its_views_frame(model: ModelConfig, scene: Scene) -> None:
    worker = RewardWorker(MASKED, RELOOK, model, "cpu", 1)
    view = View(left=10, top=20, right=66, bottom=76, height=112, width=112)  # 56 px shown at 112
    group = looked(scene, box_text(scene, 0), '<answer>[{"bbox_2d": [20, 40, 80, 100]}]</answer>', view)
    later = replace(TRUST, weights=(0.0, 0, 0, 0, 0, 0, 9.0, 0))  # the later one is always believed
    (score,) = worker.score(group, look=later).scores
    assert score.kept == 1 and score.answer.objects[0].box == (20, 40, 50, 70)
    first, second = score.candidates
    assert first.answer.objects[0].box == tuple(scene.objects[0].box) and second.answer == score.answer
    assert score.metrics["mask_iou"] == second.mask_iou != first.mask_iou
    earlier = replace(later, weights=(0.0, 0, 0, 0, 0, 0, -9.0, 0))
    (other,) = worker.score(group, look=earlier).scores
    assert other.kept == 0 and other.metrics["mask_iou"] == first.mask_iou
    assert other.metrics["matched_iou"] == 1  # mean over the one pair


def test_a_second_pass_that_does_not_parse_is_marked_and_never_kept(model: ModelConfig, scene: Scene) -> None:
    worker = RewardWorker(MASKED, RELOOK, model, "cpu", 1)
    view = View(left=10, top=20, right=66, bottom=76, height=112, width=112)
    (score,) = worker.score(looked(scene, box_text(scene, 0), "nonsense", view), look=TRUST).scores
    assert score.kept == 0 and score.answer.failure is None
    assert score.failure is not None and score.failure.kind is FailureKind.UNPARSED


def test_pool_scores_by_reference_and_keeps_an_image_in_its_place(
    cluster: None, model: ModelConfig, scene: Scene
) -> None:
    async def run() -> None:
        pool = RewardPool(MASKED, LookConfig(), model, PLACEMENT)
        await pool.start()
        group = asked(scene, [answer(scene)])
        by_reference = asked(scene, [answer(scene)], ref=ray.put(group.prompt.images[0].ref))
        first, second = await pool.score(by_reference), await pool.score(group)
        assert first.scores == second.scores and (first.cached, second.cached) == (False, True)
        assert 0 < (await pool.examine(group, TRUST))[0].confidence < 1
        assert (await pool.stats())["groups"] == 2
        # what a worker raises becomes a marked score that names the sample
        bare = Target(boxes=truth(scene).boxes, points=truth(scene).points)
        failed = await pool.score(asked(scene, [answer(scene)] * 2, target=bare))
        assert [s.failure.kind for s in failed.scores if s.failure] == [FailureKind.SCORER] * 2
        assert failed.scores[0].failure and "'scene 1' has no masks" in failed.scores[0].failure.detail
        pool.shutdown()

    asyncio.run(run())


def kill(actor: ray.actor.ActorHandle) -> None:
    """Returns once the actor is gone: `ray.kill` alone does not wait."""
    ray.kill(actor)
    for _ in range(1000):
        try:
            ray.get(actor.stats.remote(), timeout=30)
        except RayActorError:
            return
    raise TimeoutError("the killed reward worker still answers")


def test_pool_restarts_a_dead_worker_and_gives_up_in_the_end(cluster: None, scene: Scene) -> None:
    async def run() -> None:
        pool = RewardPool(PLAIN, LookConfig(), ModelConfig(path="", segmenter=""), PLACEMENT)
        await pool.start()
        group = asked(scene, [answer(scene)])
        for deaths in range(3):
            assert (await pool.score(group)).scores[0].metrics == {"think_format": 1, "count_ratio": 1}
            assert pool.restarts == deaths
            kill(pool._slots[0].actor)
        with pytest.raises(RewardError, match="reward worker 0 died 3 times"):
            await pool.score(group)
        pool.shutdown()

    asyncio.run(run())


def test_pool_says_which_worker_did_not_start(cluster: None, tmp_path: Path) -> None:
    async def run() -> None:
        pool = RewardPool(MASKED, LookConfig(), ModelConfig(path="", segmenter=str(tmp_path)), PLACEMENT)
        with pytest.raises(RewardError, match=r"reward worker 0 did not start(.|\n)*has no \*.yaml"):
            await pool.start()

    asyncio.run(run())
