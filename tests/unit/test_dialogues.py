"""What the warm start shows a policy: the right answer in the right frame, and only that to be learned."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from launch.run.prompts import PromptMaker
from perception.config import LookConfig, ModelConfig
from perception.tasks import TASKS
from synthetic import policies
from synthetic.dialogues import one_look, two_looks
from synthetic.policy import WarmStart, _Batches, corpus
from synthetic.prepare import read_tasks
from synthetic.scenes import WORLD, ask, generate

LOOK = LookConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy")
    tokenizer = policies.make_tokenizer(islice(corpus(WORLD, read_tasks("brief")), 300))
    shape = policies.SHAPES["mini"]
    policies.save(policies.make_model(shape, tokenizer, 0), tokenizer, path, shape.max_side)
    return path


@pytest.fixture(scope="module")
def prompts(folder: Path) -> PromptMaker:
    return PromptMaker(ModelConfig(path=str(folder), segmenter=""), read_tasks("brief"))


def test_one_look_answers_in_half_the_scenes_pixels(prompts: PromptMaker) -> None:
    for seed in range(30):
        scene = generate(seed, WORLD)
        question = ask(scene, np.random.default_rng(seed), WORLD)
        dialogue = one_look(seed, WORLD, prompts, inline=False)
        answer = TASKS[question.task].parse(dialogue.completions[0])
        assert len(answer.objects) == len(question.targets)
        for item, index in zip(answer.objects, question.targets, strict=True):
            assert np.abs(np.subtract(item.box, np.array(scene.objects[index].box) / 2)).max() <= 0.5
        assert "<look>" not in dialogue.completions[0]
        inline = one_look(seed, WORLD, prompts, inline=True)
        assert "<look>" in inline.completions[0] and inline.input_ids != dialogue.input_ids


def test_a_second_look_shows_the_target_larger_and_answers_in_the_views_frame(prompts: PromptMaker) -> None:
    """The answered box, cut out of the view, holds what the same box of the scene holds."""
    kept = 0
    for seed in range(150):
        dialogue = two_looks(seed, WORLD, prompts, LOOK)
        _whole, closer = dialogue.images
        assert closer.shape == (112, 112, 3)
        first, second = (TASKS["segment"].parse(completion) for completion in dialogue.completions)
        assert first.failure is None and second.failure is None
        kept += bool(second.objects)
        for item in second.objects:
            assert item.box is not None and item.point is not None
            x1, y1, x2, y2 = item.box
            assert 0 <= x1 < x2 <= 112 and 0 <= y1 < y2 <= 112
            assert x1 <= item.point[0] <= x2 and y1 <= item.point[1] <= y2
    assert 75 <= kept < 150  # in some, what was asked for is not in the view


def test_the_second_answer_is_the_truth_enlarged(prompts: PromptMaker) -> None:
    """Scenes of one object: its box in the view, scaled back, has the size of its box in the scene."""

    alone = replace(WORLD, max_objects=1, no_target=0.0, counting=0.0)
    for seed in range(0, 200, 5):
        (x1, y1, x2, y2) = generate(seed, alone).objects[0].box
        dialogue = two_looks(seed, alone, prompts, LOOK)
        (item,) = TASKS["segment"].parse(dialogue.completions[1]).objects or (None,)
        if item is None or item.box is None or min(item.box) <= 0 or max(item.box) >= 112:
            continue  # cut by the view's edge
        if not np.array_equal(dialogue.images[0], generate(seed, alone).image):
            continue  # its first answer covered too much: another scene took its place
        wide, tall = item.box[2] - item.box[0], item.box[3] - item.box[1]
        assert wide / tall == pytest.approx((x2 - x1) / (y2 - y1), rel=0.12)
        assert wide > (x2 - x1) / 2  # larger than the policy saw it in the whole image


def test_only_the_last_completion_is_learned(folder: Path, prompts: PromptMaker) -> None:
    config = WarmStart(batch=6, second_looks=3)
    once, twice = next(iter(_Batches(config, prompts)))
    for half in (once, twice):
        assert half["input_ids"].shape == half["labels"].shape and len(half["input_ids"]) == 3
        for ids, labels in zip(half["input_ids"], half["labels"], strict=True):
            learned = prompts.tokenizer.decode(labels[labels >= 0])
            assert learned.startswith("<think>") and learned.endswith("</answer><|im_end|>")
            assert learned.count("<answer>") == 1
            assert prompts.tokenizer.decode(ids).replace("<|endoftext|>", "").endswith(learned)
    assert len(once["image_grid_thw"]) == 3 and len(twice["image_grid_thw"]) == 6
    assert int(twice["mm_token_type_ids"].sum()) == 6 * 16
