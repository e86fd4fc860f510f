"""Guards the reward workers as a pool of real Ray actors: images by reference, failures as values, restarts."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
from ray.exceptions import RayActorError

from perception.config import LookConfig, ModelConfig, PlacementConfig, RewardConfig
from perception.types import FailureKind, Group, LookState, Target
from reward_workers.pool import RewardPool
from runtime import objects
from runtime.actors import ActorError
from runtime.placement import anywhere
from synthetic.scenes import generate
from tests import builders, tiny_segmenter
from tests.builders import group, image, scene_target, target, trajectory

MASKED = RewardConfig(name="masked", components={"mask_iou": 1.0, "parsed": 1.0}, timeout_s=240)
PLAIN = RewardConfig(name="plain", components={"think_format": 1.0, "count_ratio": 1.0}, timeout_s=240)
PLACEMENT = PlacementConfig(name="test", device="cpu", reward_cpus=0.5, threads=1)
SCENE = next(scene for scene in map(generate, range(100)) if len(scene.objects) == 2)
TRUTH = scene_target(SCENE.objects)

pytestmark = pytest.mark.usefixtures("shared_ray")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return tiny_segmenter.build(tmp_path_factory.mktemp("segmenter"))


def make_pool(reward: RewardConfig, model: ModelConfig) -> RewardPool:
    return RewardPool(reward, LookConfig(), model, PLACEMENT, anywhere(PLACEMENT, "reward", 1))


def answers(n: int = 1, truth: Target = TRUTH) -> Group:
    """The scene's boxes, n times."""
    items = [f'{{"bbox_2d": {list(o.box)}, "point_2d": {list(o.point)}}}' for o in SCENE.objects]
    text = f"<think>here</think><answer>[{', '.join(items)}]</answer>"
    prompt = builders.prompt(builders.sample("scene 1", truth), images=(image(SCENE.image),))
    return group(*(trajectory(text) for _ in range(n)), about=prompt)


def test_pool_scores_by_reference_and_keeps_an_image_in_its_place(model: ModelConfig) -> None:
    async def run() -> None:
        pool = make_pool(MASKED, model)
        assert await pool.start() > 0
        plain = answers()
        (handle,) = plain.prompt.images
        by_reference = replace(plain, prompt=replace(plain.prompt, images=(replace(handle, ref=ray.put(handle.ref)),)))
        first, second = await pool.score(by_reference), await pool.score(plain)
        assert first.trajectories == second.trajectories and (first.cached, second.cached) == (False, True)
        (one,) = first.trajectories
        assert one.score is not None and one.score.metrics["parsed"] == 1
        known = LookState(weights=(0.0, 4.0, 0, 0, 0, 0, 0, 0), threshold=0.0, explore=0.0)
        assert 0 < (await pool.examine(plain, known))[0].confidence < 1
        # what a worker raises becomes marked trajectories that name the sample
        failed = await pool.score(answers(2, target(TRUTH.boxes, TRUTH.points)))
        for one in failed.trajectories:
            assert one.score is None and one.failure is not None and one.failure.kind is FailureKind.SCORER
            assert one.failure.detail.startswith("score of 'scene 1' raised ValueError(\"sample 'scene 1' has no masks")
        await pool.shutdown()

    asyncio.run(run())


def kill(actor: ray.actor.ActorHandle) -> None:
    """Returns once the actor is gone: `ray.kill` alone does not wait."""
    ray.kill(actor)
    for _ in range(1000):
        try:
            ray.get(actor.start.remote(), timeout=30)
        except RayActorError:
            return
    raise TimeoutError("the killed reward worker still answers")


def test_pool_restarts_a_dead_worker_and_gives_up_in_the_end() -> None:
    async def run() -> None:
        pool = make_pool(PLAIN, ModelConfig(path="", segmenter=""))
        await pool.start()
        for deaths in range(3):
            (one,) = (await pool.score(answers())).trajectories
            assert one.score is not None and one.score.metrics == {"think_format": 1, "count_ratio": 1}
            assert pool.actors.restarts == deaths
            kill(pool.actors.slots[0].actor)
        with pytest.raises(ActorError, match="reward worker 0 died 3 times"):
            await pool.score(answers())
        await pool.shutdown()

    asyncio.run(run())


def test_a_score_that_takes_too_long_is_a_failure_that_names_the_setting() -> None:
    async def run() -> None:
        pool = make_pool(replace(PLAIN, timeout_s=0.5), ModelConfig(path="", segmenter=""))
        await pool.start()
        own = await pool.actors.slots[0].actor.__ray_call__.remote(lambda self: os.getpid())
        psutil.Process(own).suspend()
        (late,) = (await pool.score(answers())).trajectories
        assert late.excluded and late.failure is not None
        assert late.failure.detail == "score: no answer from reward worker 0 in 0.5 s (reward.timeout_s)"
        psutil.Process(own).resume()
        await pool.shutdown()

    asyncio.run(run())


def test_pool_says_which_worker_did_not_start(tmp_path: Path) -> None:
    async def run() -> None:
        pool = make_pool(MASKED, ModelConfig(path="", segmenter=str(tmp_path)))
        with pytest.raises(ActorError, match=r"reward worker 0 did not start(.|\n)*needs \*\.yaml"):
            await pool.start()

    asyncio.run(run())


def test_an_image_that_the_object_store_does_not_give_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    never = ray.remote(num_cpus=0.1)(lambda: time.sleep(60)).remote()
    late = replace(image(SCENE.image), ref=never)
    monkeypatch.setattr(objects, "FETCH_TIMEOUT_S", 0.2)
    with pytest.raises(RuntimeError, match=f"image {late.key} did not come from Ray's store in 0.2 s"):
        objects.fetch(late)
    ray.cancel(never, force=True)
