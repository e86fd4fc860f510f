"""The loop's small parts: data order, prompts, the parity gate, the failure limit, a step's metrics."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.run.batch import Batch, check_failures
from launch.run.cursor import Cursor
from launch.run.parity import parity_gate
from launch.run.prompts import PromptMaker, prompt_seed, read_policy_spec
from launch.run.step_metrics import step_metrics
from launch.run.system import Sync
from learner.advantages import with_advantages
from perception import masks
from perception import metric_catalog as catalog
from perception.config import Config, ModelConfig, TaskConfig
from perception.errors import UserError
from perception.types import FailureKind, Group, ImageHandle, LearnerReport
from synthetic.scenes import SceneStyle
from synthetic.world import records
from tests import builders
from tests.builders import candidate, changed, group, lost, measured, sample, target, trajectory, turn, unparsed
from tests.tiny_policy import build

FORM = TaskConfig(system="Be brief.", template='Find "{question}".', inline='Look for "{question}".', again="Again.")


def test_every_epoch_holds_every_sample_once_in_another_order() -> None:
    samples = [sample(str(i)) for i in range(10)]
    cursor = Cursor(samples, seed=3)
    first, second = ([s.id for s in cursor.next(10)] for _ in range(2))
    assert Counter(first) == Counter(second) == Counter(s.id for s in samples)
    assert first != second


def test_a_cursor_goes_on_from_its_position() -> None:
    samples = [sample(str(i)) for i in range(7)]
    whole = [s.id for s in Cursor(samples, seed=1).next(20)]
    part = Cursor(samples, seed=1)
    part.next(9)
    assert [s.id for s in Cursor(samples, seed=1, position=part.position).next(11)] == whole[9:]


def test_seeds_differ_by_run_step_and_position() -> None:
    seeds = {prompt_seed(run, step, place) for run in range(3) for step in range(20) for place in range(20)}
    assert len(seeds) == 3 * 20 * 20 and all(0 <= seed < 2**31 for seed in seeds)


def test_a_prompt_holds_one_placeholder_and_the_frame_of_the_resized_image(tmp_path: Path) -> None:
    build(tmp_path)
    model = ModelConfig(path=str(tmp_path), segmenter="")
    spec = read_policy_spec(model)
    maker = PromptMaker(model, {"segment": FORM, "published": replace(FORM, form="dr_seg")})
    asked = sample(height=100, width=300, question="The Cat.")
    image = ImageHandle(key="k", height=100, width=300, ref=b"")
    prompt = maker.prompt(asked, image, seed=5)
    assert prompt.task == "segment" and prompt.sample == asked
    assert prompt.token_ids.count(spec.image_token_id) == 1
    assert 'Find "The Cat.".' in maker.tokenizer.decode(prompt.token_ids)
    inline = maker.prompt(asked, image, seed=5, inline=True)
    assert 'Look for "The Cat.".' in maker.tokenizer.decode(inline.token_ids)
    # the task behind a sample's name words the question and reads the answers: Dr. Seg's lower-cases it
    published = maker.prompt(replace(asked, task="published"), image, seed=5)
    assert published.task == "dr_seg" and 'Find "the cat".' in maker.tokenizer.decode(published.token_ids)
    # 224 * 224 pixels at most, sides in multiples of 28: 100 x 300 -> 112 x 308 (smart_resize of the processor)
    assert (prompt.answer_height, prompt.answer_width) == (112, 308)
    assert spec.image_token_id in spec.banned_token_ids and len(spec.banned_token_ids) == 4


def test_a_second_look_goes_on_where_the_answer_ended(tmp_path: Path) -> None:
    """Prompt, answer, end token and what is fed then are the chat template's own rendering of the whole dialogue."""
    build(tmp_path)
    form = TaskConfig(system="Be brief.", template="Find {question}.", inline="", again="Again.")
    maker = PromptMaker(ModelConfig(path=str(tmp_path), segmenter=""), {"segment": form})
    image = {"type": "image"}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image, {"type": "text", "text": "Find the cat."}]},
        {"role": "assistant", "content": "[1, 2]"},
        {"role": "user", "content": [image, {"type": "text", "text": "Again."}]},
    ]
    whole = maker.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    said = [*maker.tokenizer.encode("[1, 2]"), maker.tokenizer.eos_token_id]
    row = [*maker.tokens(sample(question="the cat")), *said, *maker.again("segment")]
    assert maker.tokenizer.decode(row) == whole


def parity_gate_of(mismatch: float, settings: Config) -> None:
    async def parity(groups: Any) -> dict[str, float]:
        return {catalog.LOGPROB_MISMATCH: mismatch, catalog.LOGPROB_MISMATCH_MAX: mismatch, catalog.RATIO: 1.0}

    system: Any = SimpleNamespace(learner=SimpleNamespace(parity=parity), config=settings)
    asyncio.run(parity_gate(system, [group(measured())], print))


@pytest.mark.parametrize(
    ("dtype", "quantization", "given", "limit"),
    [
        ("float32", None, None, 0.02),
        ("bfloat16", None, None, 0.05),
        ("bfloat16", "fp8", None, 0.2),
        ("float32", None, 0.3, 0.3),
        ("bfloat16", "fp8", 0.01, 0.01),
    ],
)
def test_the_parity_gate_stops_a_run_whose_engine_and_learner_disagree(
    dtype: str, quantization: str | None, given: float | None, limit: float
) -> None:
    settings = changed(changed(builders.config(), "model", dtype=dtype), "rollout", quantization=quantization)
    settings = changed(settings, "learner", parity_limit=given)
    parity_gate_of(limit * 0.99, settings)
    for mismatch in (limit * 1.01, float("nan")):
        with pytest.raises(UserError, match=rf"engine and learner disagree.*parity_limit={limit:g}\."):
            parity_gate_of(mismatch, settings)


def test_failures_of_the_infrastructure_stop_a_run_beyond_the_limit() -> None:
    about = builders.prompt(sample("street-7"))
    groups = [
        group(lost(FailureKind.SCORER, "the disk is full"), measured(), about=about),
        group(unparsed(), trajectory(failure=builders.failure(FailureKind.TRUNCATED)), about=about),
    ]
    check_failures(groups, 0.25)
    with pytest.raises(UserError, match=r"1 of 4 answers.*sample street-7 \(scorer\): the disk is full"):
        check_failures(groups, 0.2)


def batch_of(groups: list[Group], **seconds: float) -> Batch:
    waits = {"generate": 0.0, "score": 0.0, "learn": 0.0} | seconds
    return Batch(groups=groups, teaching=groups[:1], rounds=2, seconds=waits, began=time.monotonic() - 10.0)


SYNC = Sync(seconds=0.5, pause_seconds=0.25, transfer_seconds=0.125)


def test_stages_and_the_controllers_own_time_add_up_to_the_step() -> None:
    batch = batch_of([group(measured(reward=1.0))], generate=4.0, score=1.0, learn=0.5)
    found = step_metrics(1, batch, LearnerReport(metrics={}, seconds=2.0), SYNC)
    assert sum(found[name] for name in catalog.STAGES) == pytest.approx(found[catalog.SECONDS_STEP])
    assert [found[name] for name in catalog.STAGES[:4]] == [4.0, 1.0, 2.5, 0.5]  # KL in the reward is learning, too
    assert found[catalog.SECONDS_STEP] == pytest.approx(10.0, abs=0.5)
    assert found[catalog.SECONDS_CONTROLLER] == pytest.approx(2.0, abs=0.5)
    assert (found[catalog.SYNC_PAUSE], found[catalog.SYNC_TRANSFER]) == (0.25, 0.125)


def test_a_steps_metrics_are_of_what_was_measured() -> None:
    """Two groups of three: rewards 1, 0, 3 and 2, 2; one trajectory of each kind of failure; one is without a score."""
    box = builders.answer((0, 0, 9, 9))
    right = candidate(0.8, answer=box)
    groups = with_advantages(
        [
            group(
                replace(measured(right, reward=1.0, mask_iou=0.8, parsed=1.0), turns=(turn("", range(4), version=6),)),
                replace(unparsed(reward=0.0, mask_iou=0.0, parsed=0.0), turns=(turn("", range(2), version=7),)),
                replace(measured(right, reward=3.0, mask_iou=0.4, parsed=1.0), turns=(turn("", range(6), version=7),)),
                about=builders.prompt(sample(truth=target([(0, 0, 9, 9), (20, 20, 30, 30)]))),
            ),
            group(
                replace(measured(right, reward=2.0, mask_iou=0.2, parsed=1.0), turns=(turn("", range(4), version=7),)),
                lost(FailureKind.SCORER, turns=(turn("", range(8), version=2),)),
                replace(measured(right, reward=2.0, mask_iou=0.6, parsed=1.0), turns=(turn("", range(3), version=7),)),
                cached=True,
            ),
        ],
        "group",
    )
    found = step_metrics(8, batch_of(groups), LearnerReport(metrics={catalog.LOSS: 0.25}, seconds=0.0), SYNC)
    expected = {
        catalog.LOSS: 0.25,
        # the failed one's reward is no reward of 0: the mean is over the five that were measured
        catalog.REWARD_MEAN: (1 + 0 + 3 + 2 + 2) / 5,
        catalog.REWARD_STD: ((0.36 + 2.56 + 1.96 + 0.16 + 0.16) / 5) ** 0.5,
        catalog.GIOU: (0.8 + 0.0 + 0.4 + 0.2 + 0.6) / 5,
        catalog.component("parsed"): 4 / 5,
        catalog.PARSE_OK: 4 / 5,
        catalog.BOXES_ANSWERED: 4 / 5,
        catalog.BOXES_TRUE: 1.0,  # of the samples: 2 and none
        catalog.ZERO_VARIANCE: 0.5,
        catalog.failure(FailureKind.UNPARSED): 1 / 6,
        catalog.failure(FailureKind.SCORER): 1 / 6,
        catalog.failure(FailureKind.ENGINE): 0.0,
        catalog.RESPONSE_TOKENS: (4 + 2 + 6 + 4 + 8 + 3) / 6,
        catalog.SAM_CACHE_HITS: 0.5,
        catalog.SAMPLING_ROUNDS: 2.0,
        catalog.GROUPS_TRAINED: 1.0,
        # step 8 learns by version 7; the oldest token that takes part is of version 6
        catalog.POLICY_VERSION: 6.0,
        catalog.STALENESS: 1.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found[catalog.TOKENS_PER_S] == pytest.approx(27 / found[catalog.SECONDS_STEP])
    assert found[catalog.SAMPLES_PER_S] == pytest.approx(6 / found[catalog.SECONDS_STEP])
    assert catalog.KL not in found


def test_the_world_is_written_with_its_masks_and_the_same_seed_writes_the_same_bytes() -> None:
    style = SceneStyle(side=112)
    one, two = list(records(range(5), style)), list(records(range(5), style))
    assert one == two
    for item in (item for record in one for item in record.objects):
        assert item.mask is not None and masks.bounding_box(item.mask) == item.box
