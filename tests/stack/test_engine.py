"""What the rollout engine samples: whole groups, repeatable, nothing banned, with the log-probs a learner computes."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import create_autospec, patch

import numpy as np
import pytest
import ray

from perception.config import PlacementConfig, RolloutConfig
from perception.errors import UserError
from perception.types import FailureKind, Feed, Group, Prompt, SamplingSpec, Trajectory, Turn
from rollout.defaults import by_placement
from rollout.engine import EnginePart, answer_text, check_fp8, engine_args
from tests import builders
from tests.builders import noise_image
from tests.hf_reference import Reference
from tests.tiny_policy import IMAGE_TOKENS
from tests.trainer import CONFIG, Trainer

SAMPLING = SamplingSpec(n=8, temperature=1.7, max_new_tokens=128)


@pytest.fixture(scope="module")
def reference(trainer: Trainer) -> Reference:
    return trainer.reference


@pytest.fixture(scope="module")
def engine(trainer: Trainer) -> Any:
    return trainer.pool.actors.slots[0].actor


@pytest.fixture(scope="module")
def groups(engine: Any, reference: Reference) -> list[Group]:
    return generate(engine, [reference.prompt(seed) for seed in range(4)])


def generate(engine: Any, prompts: list[Prompt], sampling: SamplingSpec = SAMPLING) -> list[Group]:
    return ray.get([engine.generate.remote(prompt, sampling) for prompt in prompts], timeout=280)


def test_every_group_is_whole(groups: list[Group], reference: Reference) -> None:
    for seed, group in enumerate(groups):
        assert [t.index for t in group.trajectories] == list(range(8))
        for trajectory in group.trajectories:
            (turn,) = trajectory.turns
            assert turn.input_ids == reference.prompt(seed).token_ids
            assert len(turn.logprobs) == len(turn.token_ids) == trajectory.sampled_tokens
            (span,) = turn.versions
            assert (span.version, span.start, span.end) == (0, 0, len(turn.token_ids))
            assert turn.text == answer_text(reference.policy, reference.processor.tokenizer, turn.token_ids)


def test_an_answer_ends_with_the_end_token_or_is_marked_truncated(groups: list[Group], reference: Reference) -> None:
    (end,) = reference.policy.eos_token_ids
    trajectories = [t for group in groups for t in group.trajectories]
    for trajectory in trajectories:
        (turn,) = trajectory.turns
        if trajectory.failure is None:
            assert turn.finish_reason == "stop" and turn.token_ids.index(end) == len(turn.token_ids) - 1
        else:
            assert trajectory.failure.kind is FailureKind.TRUNCATED
            assert len(turn.token_ids) == SAMPLING.max_new_tokens and end not in turn.token_ids
    assert {t.failure is None for t in trajectories} == {True, False}


def test_placeholders_are_never_sampled(groups: list[Group], reference: Reference) -> None:
    sampled = [token for group in groups for t in group.trajectories for token in t.turns[0].token_ids]
    assert len(sampled) > 2000
    assert not set(sampled) & set(reference.policy.banned_token_ids)


def test_logprobs_are_those_of_transformers_under_mask_and_temperature(
    groups: list[Group], reference: Reference
) -> None:
    for group in groups[:2]:
        for trajectory in group.trajectories:
            (turn,) = trajectory.turns
            table = reference.logprobs(group.prompt, turn.token_ids, SAMPLING.temperature)
            expected = table[np.arange(len(turn.token_ids)), turn.token_ids]
            np.testing.assert_allclose(turn.logprobs, expected, atol=1e-5, rtol=0)


def test_the_image_matters(groups: list[Group], reference: Reference) -> None:
    group = groups[0]
    other = replace(group.prompt, images=reference.prompt(99).images)
    ids = group.trajectories[0].turns[0].token_ids
    mine, others = (np.exp(reference.logprobs(prompt, ids, 1.0)) for prompt in (group.prompt, other))
    assert np.abs(mine - others).max() > 0.01


def test_same_seed_same_group_whatever_else_runs(engine: Any, groups: list[Group]) -> None:
    again = generate(engine, [groups[2].prompt])
    assert [t.turns[0].token_ids for t in again[0].trajectories] == [
        t.turns[0].token_ids for t in groups[2].trajectories
    ]
    children = {t.turns[0].token_ids for t in again[0].trajectories}
    assert len(children) == 8


def test_temperature_zero_is_greedy(engine: Any, reference: Reference) -> None:
    prompt = reference.prompt(5, images=2)
    (group,) = generate(engine, [prompt], SamplingSpec(n=1, temperature=0.0, max_new_tokens=24))
    (turn,) = group.trajectories[0].turns
    assert turn.token_ids == tuple(reference.logprobs(prompt, turn.token_ids, 1.0).argmax(-1))


def sample(
    engine: Any, prompt: Prompt, index: int, turns: tuple[Turn, ...] = (), feed: Feed | None = None
) -> Trajectory:
    return ray.get(engine.sample.remote(prompt, index, turns, feed, SAMPLING), timeout=280)


def closer(reference: Reference, seed: int) -> Feed:
    text = f"\n<|im_start|>user\n{IMAGE_TOKENS}Again.<|im_end|>\n<|im_start|>assistant\n"
    view = builders.view(0, 0, 56, 56, 84, 84)
    ids = tuple(reference.processor.tokenizer(text).input_ids)
    return Feed(input_ids=ids, images=(noise_image(seed, 84, 84),), view=view)


def test_a_sample_of_its_own_is_the_one_its_group_would_hold(
    engine: Any, groups: list[Group], reference: Reference
) -> None:
    for index in (0, 3, 7):
        alone = sample(engine, groups[1].prompt, index)
        assert alone.index == index
        assert alone.turns[0].token_ids == groups[1].trajectories[index].turns[0].token_ids


def test_a_second_turn_has_the_logprobs_of_transformers_and_comes_from_the_prefix_cache(
    engine: Any, groups: list[Group], reference: Reference
) -> None:
    group = groups[0]
    first = next(t for t in group.trajectories if t.failure is None and len(t.turns[0].token_ids) > 32)
    feed = closer(reference, 50)
    whole = sample(engine, group.prompt, first.index, first.turns, feed)
    one, two = whole.turns
    assert one == first.turns[0] and two.input_ids == feed.input_ids and two.view == feed.view
    row = (*group.prompt.token_ids, *one.token_ids, *feed.input_ids)
    dialogue = replace(group.prompt, token_ids=row, images=(*group.prompt.images, *feed.images))
    table = reference.logprobs(dialogue, two.token_ids, SAMPLING.temperature)
    expected = table[np.arange(len(two.token_ids)), two.token_ids]
    np.testing.assert_allclose(two.logprobs, expected, atol=1e-5, rtol=0)
    # 112 x 140 px are 4 x 5 image tokens
    assert two.prefix_tokens == len(group.prompt.token_ids) - 1 + 20 + len(one.token_ids)
    assert two.prefix_tokens - CONFIG.block_size < two.prefix_cached <= two.prefix_tokens
    assert two.prefix_cached % CONFIG.block_size == 0 and one.prefix_tokens == 0


def test_a_second_turn_that_fails_keeps_the_first(engine: Any, groups: list[Group], reference: Reference) -> None:
    first = groups[0].trajectories[0]
    feed = replace(closer(reference, 51), images=())
    marked = sample(engine, groups[0].prompt, 0, first.turns, feed)
    assert marked.failure is not None and marked.failure.kind is FailureKind.ENGINE
    assert "2 image placeholders for 1 images" in marked.failure.detail
    assert marked.turns == first.turns


def test_a_bad_request_is_a_marked_group_not_an_exception(engine: Any, reference: Reference) -> None:
    good = reference.prompt(6)
    stray = replace(good, token_ids=(*good.token_ids, reference.policy.image_token_id))
    too_long = replace(good, token_ids=good.token_ids * 40, images=good.images * 40)
    broken = replace(good, images=(replace(good.images[0], key="broken", ref=b"not an image"),))
    marked = generate(engine, [stray, too_long, broken, good])
    for group in marked[:3]:
        assert len(group.trajectories) == 8
        for trajectory in group.trajectories:
            assert trajectory.failure is not None and trajectory.failure.kind is FailureKind.ENGINE
            assert trajectory.failure.detail.startswith("sample s6: ")
    assert "2 image placeholders for 1 images" in marked[0].trajectories[0].failure.detail
    assert all(t.turns for t in marked[3].trajectories)


def test_a_group_is_one_request_and_its_image_is_decoded_once(engine: Any, groups: list[Group]) -> None:
    def seen() -> tuple[int, list[str]]:
        """How many requests there were, and the keys of the decoded images, which are added in order."""
        looked = engine.__ray_call__.remote(lambda self: (repr(self._ids), list(self._images._kept)))
        count, images = ray.get(looked, timeout=30)
        return int(count.removeprefix("count(").rstrip(")")), images

    (requests, images), prompt = seen(), groups[0].prompt
    generate(engine, [prompt])
    assert seen() == (requests + 1, images) and prompt.images[0].key in images


def test_more_prompt_tokens_than_one_batch_takes_leave_the_engine_alive(engine: Any, reference: Reference) -> None:
    """vLLM then computes some prompts in part and rewinds their generators, which torch's CPU generator cannot do."""
    few = SamplingSpec(n=8, temperature=1.0, max_new_tokens=4)
    groups = generate(engine, [reference.prompt(seed) for seed in range(64)], few)
    failures = {t.failure.kind for group in groups for t in group.trajectories if t.failure is not None}
    assert failures <= {FailureKind.TRUNCATED}


def in_its_process(engine: Any, function: Any, *arguments: Any) -> Any:
    """There vLLM has been imported."""
    return ray.get(engine.__ray_call__.remote(function, *arguments), timeout=60)


def starting(self: Any, config: RolloutConfig, engine_gpus: float, free_gib: int) -> str:
    """What vLLM says about a start on a GPU of 80 GiB of which so much is free; "" where it starts."""
    from vllm.v1.worker.utils import request_memory

    where = PlacementConfig(name="test", device="cuda", engine_gpus=engine_gpus)
    wanted = engine_args(self._policy, by_placement(config, where))
    gpu = SimpleNamespace(total_memory=80 << 30, free_memory=free_gib << 30, device_="cuda:0")
    try:
        request_memory(gpu, SimpleNamespace(gpu_memory_utilization=wanted.gpu_memory_utilization))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("settings", "gpus", "free_gib", "starts"),
    [
        ({}, 0.4, 25, True),  # 0.3 of 80
        ({}, 0.4, 20, False),
        ({}, 1.0, 75, True),  # 0.9 of 80
        ({}, 1.0, 70, False),
        ({"kv_cache_mb": 4096}, 0.4, 10, True),  # beside a learner at work
        ({"kv_cache_mb": 4096, "gpu_memory": 0.8}, 0.4, 10, True),
    ],
)
def test_a_kv_cache_of_a_given_size_lets_an_engine_start_on_a_busy_gpu(
    engine: Any, settings: dict[str, Any], gpus: float, free_gib: int, starts: bool
) -> None:
    said = in_its_process(engine, starting, RolloutConfig(**settings), gpus, free_gib)
    assert (said == "") == starts
    assert starts or "less than desired GPU memory utilization" in said


@pytest.mark.parametrize(("cuda", "fp8", "refused"), [(True, False, True), (True, True, False), (False, False, False)])
def test_fp8_is_refused_on_a_gpu_without_it(engine: Any, cuda: bool, fp8: bool, refused: bool) -> None:
    def checked(self: Any) -> str:
        card = SimpleNamespace(is_cuda=lambda: cuda, supports_fp8=lambda: fp8)
        with patch("vllm.platforms.current_platform", card):
            try:
                check_fp8()
            except UserError as error:
                return str(error)
        return ""

    said = in_its_process(engine, checked)
    assert said == (
        "rollout.quantization=fp8 needs compute capability 8.9 (Ada, Hopper) or more: take null" if refused else ""
    )


def test_sleep_and_waking_are_vllms_own_of_an_engine_that_was_built_for_them(engine: Any) -> None:
    """vLLM's CPU build cannot sleep: its class is asked, not an engine."""

    def played(self: Any) -> list[Any]:
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.executor.abstract import SLEEP_TAGS

        built = [engine_args(self._policy, CONFIG, sleeps).enable_sleep_mode for sleeps in (False, True)]
        asked = create_autospec(AsyncLLM, instance=True)
        with patch.multiple(self, _engine=asked, _watch=SimpleNamespace(or_death=lambda call, doing: call)):
            for call in (self.sleep(), self.wake(["weights"]), self.wake(["kv_cache"])):
                with suppress(StopIteration):
                    call.send(None)
        return [
            built,
            set(get_args(EnginePart)) == SLEEP_TAGS,
            [(*one,) for one in asked.method_calls],
        ]

    assert in_its_process(engine, played) == [
        [False, True],
        True,
        [("sleep", (), {"level": 1}), ("wake_up", (["weights"],), {}), ("wake_up", (["kv_cache"],), {})],
    ]
