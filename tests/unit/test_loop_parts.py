"""The loop's small parts: data order, prompts, the parity gate, the failure limit, the stage clock."""

from __future__ import annotations

import asyncio
import io
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from launch.record.progress import Progress
from launch.run.data import Cursor
from launch.run.failures import check_failures
from launch.run.parity import parity_gate
from launch.run.prompts import PromptMaker, prompt_seed, read_policy_spec
from launch.run.step_metrics import StageClock
from launch.world import records
from perception import masks
from perception import metric_catalog as catalog
from perception.config import ModelConfig, TaskConfig
from perception.errors import UserError
from perception.scenes import SceneStyle
from perception.types import (
    Answer,
    Failure,
    FailureKind,
    Group,
    ImageHandle,
    Prompt,
    Sample,
    Score,
    ScoredGroup,
    Target,
    Trajectory,
)
from tests.tiny_policy import build


def sample(name: str = "a", height: int = 112, width: int = 112) -> Sample:
    nothing = Target(boxes=np.zeros((0, 4), np.float32), points=np.zeros((0, 2), np.float32))
    return Sample(
        id=name, image_path="", height=height, width=width, question="The Cat.", task="segment", target=nothing
    )


def scored(kinds: list[FailureKind | None]) -> ScoredGroup:
    prompt = Prompt(sample=sample("street-7"), token_ids=(), images=(), answer_height=1, answer_width=1, seed=0)
    failures = [Failure(kind=kind, detail="the disk is full") if kind else None for kind in kinds]
    trajectories = tuple(Trajectory(index=i, turns=(), failure=f) for i, f in enumerate(failures))
    scores = tuple(Score(metrics={}, answer=Answer(objects=()), failure=f) for f in failures)
    return ScoredGroup(group=Group(prompt=prompt, trajectories=trajectories), scores=scores, seconds=0.0, cached=False)


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
    maker = PromptMaker(
        model,
        {
            "segment": TaskConfig(
                system="Be brief.", template='Find "{question}".', inline='Look for "{question}".', again="Again."
            )
        },
    )
    image = ImageHandle(key="k", height=100, width=300, ref=b"")
    prompt = maker.prompt(sample(height=100, width=300), image, seed=5)
    assert prompt.token_ids.count(spec.image_token_id) == 1
    assert 'Find "the cat".' in maker.tokenizer.decode(prompt.token_ids)
    inline = maker.prompt(sample(height=100, width=300), image, seed=5, inline=True)
    assert 'Look for "the cat".' in maker.tokenizer.decode(inline.token_ids)
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
    row = [*maker.tokens("the cat", "segment"), *said, *maker.again("segment")]
    assert maker.tokenizer.decode(row) == whole


def test_the_parity_gate_stops_a_run_whose_engine_and_learner_disagree() -> None:
    async def gate(mismatch: float) -> None:
        async def parity(groups: Any) -> dict[str, float]:
            return {
                catalog.LOGPROB_MISMATCH: mismatch,
                catalog.LOGPROB_MISMATCH_MAX: mismatch,
                catalog.RATIO: 1.0,
            }

        learner = SimpleNamespace(parity=parity)
        config = SimpleNamespace(learner=SimpleNamespace(parity_limit=0.02))
        system: Any = SimpleNamespace(learner=learner, config=config)
        await parity_gate(system, [scored([None])], Progress(1, console=Console(file=io.StringIO())))

    asyncio.run(gate(0.01))
    for mismatch in (0.03, float("nan")):
        with pytest.raises(UserError, match=r"engine and learner disagree.*parity_limit=0\.02"):
            asyncio.run(gate(mismatch))


def test_failures_of_the_infrastructure_stop_a_run_beyond_the_limit() -> None:
    groups = [scored([FailureKind.SCORER, None]), scored([FailureKind.UNPARSED, FailureKind.TRUNCATED])]
    check_failures(groups, 0.25)
    with pytest.raises(UserError, match=r"1 of 4 answers.*sample street-7 \(scorer\): the disk is full"):
        check_failures(groups, 0.2)


def test_stages_and_the_controllers_own_time_add_up_to_the_step() -> None:
    async def step() -> dict[str, float]:
        clock = StageClock()
        with clock.generate_and_score() as sampled:
            await asyncio.sleep(0.05)
            sampled.set()
            await asyncio.sleep(0.1)
        with clock.stage(catalog.SECONDS_LEARN):
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.05)
        return clock.seconds()

    seconds = asyncio.run(step())
    assert sum(seconds[name] for name in catalog.STAGES) == pytest.approx(seconds[catalog.SECONDS_STEP])
    assert seconds[catalog.SECONDS_SCORE] > seconds[catalog.SECONDS_GENERATE] > 0.04
    assert seconds[catalog.SECONDS_CONTROLLER] > 0.04 and seconds[catalog.SECONDS_SYNC] == 0


def test_the_world_is_written_with_its_masks_and_the_same_seed_writes_the_same_bytes() -> None:
    style = SceneStyle(side=112)
    one, two = list(records(range(5), style)), list(records(range(5), style))
    assert one == two
    for item in (item for record in one for item in record.objects):
        assert item.mask is not None and masks.bounding_box(item.mask) == item.box
