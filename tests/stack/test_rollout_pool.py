"""New weights in running engines, and engines that die: the pool must never go on with stale weights or caches."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from perception.types import FailureKind, Feed, Group, SamplingSpec, Trajectory, Turn, View
from rollout.engine import EngineDead
from runtime.actors import ActorError, Limit
from tests.builders import noise_image
from tests.hf_reference import Reference
from tests.tiny_policy import IMAGE_TOKENS
from tests.trainer import Trainer

ROUNDING = 5e-5
"""Float32, after several perturbations. Stale weights or caches are off by 0.1 and more."""
GREEDY = SamplingSpec(n=1, temperature=0.0, max_new_tokens=24)
SAMPLED = SamplingSpec(n=8, temperature=1.0, max_new_tokens=900)
LONG = replace(SAMPLED, n=1)

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def greedy(trainer: Trainer, seed: int) -> Turn:
    group = await trainer.pool.generate(trainer.reference.prompt(seed), GREEDY)
    return group.trajectories[0].turns[0]


def assert_is_the_policy(trainer: Trainer, turn: Turn, seed: int) -> None:
    """Greedy tokens and log-probs are those of the reference model as it is now."""
    table = trainer.reference.logprobs(trainer.reference.prompt(seed), turn.token_ids, 1.0)
    assert turn.token_ids == tuple(table.argmax(-1))
    np.testing.assert_allclose(turn.logprobs, table.max(-1), atol=ROUNDING, rtol=0)


def second_look(reference: Reference) -> Feed:
    text = f"\n<|im_start|>user\n{IMAGE_TOKENS}Again.<|im_end|>\n<|im_start|>assistant\n"
    view = View(left=0, top=0, right=56, bottom=56, height=84, width=84)
    return Feed(
        input_ids=tuple(reference.processor.tokenizer(text).input_ids), images=(noise_image(50, 84, 84),), view=view
    )


async def test_changed_weights_change_the_next_sample(trainer: Trainer) -> None:
    before = await greedy(trainer, seed=1)
    assert_is_the_policy(trainer, before, seed=1)
    for _ in range(2):
        await trainer.step()
        after = await greedy(trainer, seed=1)  # the same image and prompt: all of it was in the caches
        assert after.token_ids != before.token_ids
        assert_is_the_policy(trainer, after, seed=1)
        assert [span.version for span in after.versions] == [trainer.version]
        before = after


async def step_in_flight(trainer: Trainer, *calls: Coroutine[Any, Any, Group | Trajectory]) -> list[Trajectory]:
    """An update while the calls are sampling. Of what comes back, the trajectories that both policies have sampled,
    each part with the log-probs of its own policy."""
    reference, old = trainer.reference, Reference(trainer.reference.policy)
    old.model.load_state_dict(reference.model.state_dict())
    running = [asyncio.create_task(call) for call in calls]
    await asyncio.sleep(0.3)
    await trainer.step()
    done = [one for task in running for one in trajectories(await task)]

    met = [one for one in done if len(one.turns[-1].versions) == 2]
    for trajectory in met:
        *earlier, turn = trajectory.turns
        first, second = turn.versions
        assert (first.version, second.version) == (trainer.version - 1, trainer.version)
        assert (first.start, second.start, second.end) == (0, first.end, len(turn.token_ids))
        row = [token for t in earlier for token in (*t.input_ids, *t.token_ids)]
        images = tuple(image for t in trajectory.turns for image in t.images)
        prompt = replace(reference.prompt(0), token_ids=(*row, *turn.input_ids), images=images)
        for span, policy in ((first, old), (second, reference)):
            table = policy.logprobs(prompt, turn.token_ids, 1.0)
            expected = table[np.arange(len(turn.token_ids)), turn.token_ids]
            part = slice(span.start, span.end)
            np.testing.assert_allclose(
                np.array(turn.logprobs)[part], expected[part], atol=1e-4, rtol=0
            )  # long rows round more
    return met


def trajectories(done: Group | Trajectory) -> tuple[Trajectory, ...]:
    return done.trajectories if isinstance(done, Group) else (done,)


async def test_requests_in_flight_survive_an_update(trainer: Trainer) -> None:
    group = trainer.pool.generate(trainer.reference.prompt(2), replace(SAMPLED, max_new_tokens=400))
    assert await step_in_flight(trainer, group), "no sample was in flight during the update"


# vLLM sends the pixels of an image only with the first of the requests that share it. An update recomputes those in
# flight from their first token, and the one with the pixels may have ended.


async def test_an_image_whose_first_request_has_ended_survives_an_update(trainer: Trainer) -> None:
    prompt = trainer.reference.prompt(100)
    await trainer.pool.sample(prompt, 0, (), None, replace(SAMPLED, n=1, max_new_tokens=4))
    others = [trainer.pool.sample(prompt, index, (), None, LONG) for index in range(1, 5)]
    assert await step_in_flight(trainer, *others)


async def test_a_group_whose_first_answer_has_ended_survives_an_update(trainer: Trainer) -> None:
    for seed in range(200, 230):
        prompt = trainer.reference.prompt(seed)
        group = await trainer.pool.generate(prompt, SAMPLED)
        first, *others = (trajectory.sampled_tokens for trajectory in group.trajectories)
        if first < 40 and max(others) > 700:
            break
    await trainer.sync()  # the same weights; the image leaves the caches
    met = await step_in_flight(trainer, trainer.pool.generate(prompt, SAMPLED))
    assert met and all(trajectory.index for trajectory in met)


async def test_a_prompt_seen_before_and_its_second_look_survive_an_update(trainer: Trainer) -> None:
    prompt = trainer.reference.prompt(300)
    group = await trainer.pool.generate(prompt, SAMPLED)
    assert await step_in_flight(trainer, trainer.pool.generate(prompt, SAMPLED))

    group = await trainer.pool.generate(prompt, replace(SAMPLED, max_new_tokens=40))
    feed = second_look(trainer.reference)
    looks = [trainer.pool.sample(prompt, one.index, one.turns, feed, LONG) for one in group.trajectories]
    met = await step_in_flight(trainer, *looks)
    assert met and all(len(trajectory.turns) == 2 for trajectory in met)


async def test_an_unknown_parameter_is_refused(trainer: Trainer) -> None:
    (bucket,) = trainer.reference.buckets(limit=1 << 30)
    wrong = replace(bucket, slots=(replace(bucket.slots[0], name="model.nothing.weight"),))
    trainer.pool.begin_update()
    await trainer.pool.stage(wrong)
    with pytest.raises(ActorError, match=r"rollout engine 0, taking new weights: .*nothing"):
        await trainer.pool.end_update(trainer.version)
    await trainer.sync()
    assert_is_the_policy(trainer, await greedy(trainer, seed=3), seed=3)


async def test_a_late_answer_is_a_marked_group(trainer: Trainer) -> None:
    pool = trainer.pool
    pool._limit, limit = Limit(0.05, "rollout.request_timeout_s"), pool._limit
    try:
        group = await pool.generate(trainer.reference.prompt(4), SamplingSpec(n=4, temperature=1.0, max_new_tokens=900))
    finally:
        pool._limit = limit
    assert len(group.trajectories) == 4
    for trajectory in group.trajectories:
        assert trajectory.failure is not None and trajectory.failure.kind is FailureKind.ENGINE
        assert "engine 0 in 0.05 s (rollout.request_timeout_s)" in trajectory.failure.detail


async def processes(trainer: Trainer) -> tuple[psutil.Process, psutil.Process]:
    """The actor's process and that of vLLM's engine under it."""
    actor = trainer.pool.actors.slots[0].actor
    mine = psutil.Process(await actor.__ray_call__.remote(lambda self: os.getpid()))
    (core,) = [child for child in mine.children(recursive=True) if "EngineCor" in child.name()]
    return mine, core


async def test_a_killed_engine_ends_every_wait_and_comes_back_with_the_current_weights(trainer: Trainer) -> None:
    """vLLM's process is killed while it owes an answer to each kind of call."""
    _, core = await processes(trainer)
    engine, prompt = trainer.pool.actors.slots[0].actor, trainer.reference.prompt(7)
    trainer.pool.begin_update()
    core.suspend()
    staging = asyncio.create_task(trainer.pool.stage(next(trainer.reference.buckets())))
    calls = [
        ("sampling", engine.generate.remote(prompt, SAMPLED)),
        ("sampling", engine.sample.remote(prompt, 0, (), None, LONG)),
        ("receiving the staged buckets", engine.end_update.remote(1, True)),
    ]
    assert ray.wait([call for _, call in calls], timeout=1.0)[0] == [] and not staging.done()
    core.kill()
    for doing, call in (*calls, ("sampling", engine.generate.remote(prompt, SAMPLED))):
        with pytest.raises(EngineDead, match=f"vLLM's engine process died while {doing}"):
            await asyncio.wait_for(call, 10.0)  # seconds; a request may take 120
    with pytest.raises(ActorError, match=r"engine 0 died while staging weight bucket 1: .* died while staging a "):
        await asyncio.wait_for(staging, 10.0)
    turns = await asyncio.gather(*(greedy(trainer, seed) for seed in (5, 6)))
    assert trainer.pool.actors.restarts == 1
    for seed, turn in zip((5, 6), turns, strict=True):
        assert_is_the_policy(trainer, turn, seed)
        assert [span.version for span in turn.versions] == [trainer.version]


async def test_no_engine_outlives_its_actor(trainer: Trainer) -> None:
    actor, core = await processes(trainer)
    actor.kill()
    assert core in psutil.wait_procs([core], timeout=20)[0]
