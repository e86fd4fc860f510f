"""Guards that a family other than Qwen-VL's is seen by launch, learner and engine as transformers itself sees it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.smolvlm import processing_smolvlm

import learner.families
import perception.families
from launch.run.prompts import PromptMaker, read_policy_spec
from learner.families import Family
from learner.families.generic import PaddedPolicy
from learner.policy import load_policy
from learner.rows import Picture, Segment, pieces
from perception.config import LearnerConfig, LoraConfig, ModelConfig, TaskConfig
from perception.errors import UserError
from perception.families import engine_name, engine_renames, family_of
from perception.registry import Registry
from perception.types import ImageHandle, PolicySpec, Trajectory
from tests import builders, tiny_families
from tests.builders import sampled_group
from tests.gradients import evaluate

TEMPERATURE = 0.8
FORM = TaskConfig(system="Be brief.", template="Find {question}.", inline="", again="Again.")


@pytest.fixture(scope="module", autouse=True)
def _without_num2words() -> Iterator[None]:
    """SmolVLM's processor asks for it, and uses it for videos alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processing_smolvlm, "num2words", str)
        yield


OTHERS = ("llava_onevision", "internvl", "idefics3", "smolvlm", "mistral3", "pixtral", "gemma3")


@pytest.fixture(scope="module", params=OTHERS)
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PolicySpec:
    return tiny_families.build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def maker(spec: PolicySpec) -> PromptMaker:
    return PromptMaker(ModelConfig(path=spec.path, segmenter=""), {"segment": FORM})


def test_the_spec_is_read_from_the_policys_own_files(spec: PolicySpec) -> None:
    assert read_policy_spec(ModelConfig(path=spec.path, segmenter="")) == spec


def test_a_prompt_has_one_first_token_and_one_placeholder(spec: PolicySpec, maker: PromptMaker) -> None:
    ids = maker.tokens(builders.sample(question="the cat"))
    image = maker.tokenizer.decode([spec.image_token_id])
    assert maker.tokenizer.decode(ids) == f"<s> Be brief. USER: {image}\nFind the cat. ASSISTANT:"
    assert ids.count(maker.tokenizer.bos_token_id) == ids.count(spec.image_token_id) == 1
    # After the answer's </s>, which was sampled, and with no first token again.
    assert maker.tokenizer.decode(maker.again("segment")) == f"USER: {image}\nAgain. ASSISTANT:"
    assert maker.answer_frame(112, 140) == (1000, 1000)


def test_image_tokens_by_hand(spec: PolicySpec, maker: PromptMaker) -> None:
    """LLaVA-OneVision, tiles of 4 x 4 tokens: the whole image is one; of its 2 x 2 or 1 x 2 parts what is not padding
    counts, and one token ends every line. InternVL: 4 tokens a tile, two marks. Idefics3: 4 tokens and two marks a
    tile, one that ends a row of tiles, and behind an empty line the whole with three marks. Mistral 3 and Pixtral:
    squares of 28 and 14 pixels, and a mark that ends a row of them."""
    idefics = {(112, 112): 4 * 6 + 2 + 1 + 4 + 3, (56, 168): 2 * 6 + 1 + 1 + 4 + 3}
    by_hand = {
        # 56 x 84 goes on 1 x 2 tiles: 4 x 8 tokens less one column of padding on either side.
        "llava_onevision": {(112, 112): 16 + 8 * 8 + 8, (56, 84): 16 + 4 * 6 + 4},
        # 112 x 112 are 2 x 2 tiles and the whole; 56 x 168 three in a line and the whole.
        "internvl": {(112, 112): 2 + 4 * 5, (56, 168): 2 + 4 * 4},
        "idefics3": idefics,
        "smolvlm": idefics,
        "mistral3": {(112, 112): 4 * (4 + 1), (56, 168): 2 * (6 + 1)},
        "pixtral": {(112, 112): 8 * (8 + 1), (56, 168): 4 * (12 + 1)},
        "gemma3": {(112, 112): 4 + 2 + 2, (56, 168): 4 + 2 + 2},
    }[Path(spec.path).name[:-1]]
    assert {size: maker.image_tokens(*size) for size in by_hand} == by_hand


@lru_cache(maxsize=1)
def stock(path: str) -> tuple[Any, Any]:
    processor = AutoProcessor.from_pretrained(path, backend="torchvision")
    return processor, AutoModelForImageTextToText.from_pretrained(path)


def reference(spec: PolicySpec, trajectory: Trajectory) -> Tensor:
    """Log-probs of the sampled tokens by the processor's joint call on all images and a plain forward pass."""
    processor, model = stock(spec.path)
    images = [Image.open(io.BytesIO(handle.ref)) for turn in trajectory.turns for handle in turn.images]
    inputs: dict[str, Tensor] = {}
    expanded: list[list[int]] = []
    if images:
        text = [processor.image_token * len(images)]
        inputs = dict(processor(text=text, images=images, add_special_tokens=False, return_tensors="pt"))
        expanded = [
            list(processor(text=[processor.image_token], images=[one], add_special_tokens=False)["input_ids"][0])
            for one in images
        ]
        image, together = model.config.image_token_id, inputs.pop("input_ids")[0].tolist()
        assert together.count(image) == sum(one.count(image) for one in expanded)  # Gemma's empty lines become one
        inputs.pop("attention_mask")
    row: list[int] = []
    predictors: list[int] = []
    parts = iter(expanded)
    for turn in trajectory.turns:
        for token in turn.input_ids:
            row += next(parts) if token == spec.image_token_id else [token]
        predictors += range(len(row) - 1, len(row) - 1 + len(turn.token_ids))
        row += turn.token_ids
    ids = torch.tensor([row])
    if "token_type_ids" in signature(model.forward).parameters:
        inputs["token_type_ids"] = (ids == model.config.image_token_id).long()
    with torch.no_grad():
        logits = model(input_ids=ids, **inputs).logits[0, predictors]
    logits[:, list(spec.banned_token_ids)] = -torch.inf
    sampled = torch.tensor([token for turn in trajectory.turns for token in turn.token_ids])
    return torch.log_softmax(logits / TEMPERATURE, -1).gather(1, sampled[:, None]).squeeze(1)


def test_logprobs_of_rows_with_images_of_different_sizes_are_those_of_transformers(spec: PolicySpec) -> None:
    rng = np.random.default_rng(0)
    groups = [
        sampled_group(spec, rng, n=2, side=61),
        sampled_group(spec, rng, n=1, side=112, images=2),
        sampled_group(spec, rng, n=1, images=0),
        sampled_group(spec, rng, n=1, turns=2),
    ]
    policy = load_policy(spec, TEMPERATURE, LearnerConfig(), lambda handle: handle.ref)
    found, gradient = evaluate(policy, groups, 1 << 20)
    assert len(found) == 5
    for (group, index), logprobs in found.items():
        expected = reference(spec, groups[group].trajectories[index])
        assert (logprobs - expected).abs().max() < 5e-6
    assert isinstance(policy, PaddedPolicy) == (policy.model.config.model_type == "gemma3")
    assert any("vision" in name and value.norm() > 0 for name, value in gradient.items())


def test_rows_are_what_the_engine_made_of_the_prompt(spec: PolicySpec) -> None:
    policy = load_policy(spec, TEMPERATURE, LearnerConfig(), lambda handle: handle.ref)
    group = sampled_group(spec, np.random.default_rng(1), n=2, side=112)
    (mine,) = pieces([group], policy.layout, 1 << 20)

    def expanded(*ids: int) -> Segment:
        turns = [(replace(one.turns[0], expanded_ids=ids),) for one in group.trajectories]
        done = tuple(replace(one, turns=own) for one, own in zip(group.trajectories, turns, strict=True))
        return next(pieces([replace(group, trajectories=done)], policy.layout, 1 << 20)).prompt

    row = mine.prompt.ids.tolist()
    longer = expanded(7, *row)
    assert longer.ids.tolist() == [7, *row]
    ((places, _),), ((before, _),) = longer.pictures, mine.prompt.pictures
    assert torch.equal(places, before + 1) and {row[place] for place in before} == {policy.layout.shown_id}
    dropped = [token for place, token in enumerate(row) if place != before[0]]
    with pytest.raises(ValueError, match=rf"sample s\d+: the engine made {len(before) - 1} image tokens, the learner"):
        expanded(*dropped)


def test_a_text_model_with_windows_is_not_packed(tmp_path: Path) -> None:
    spec = tiny_families.build("mistral3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["sliding_window"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    policy = load_policy(spec, TEMPERATURE, LearnerConfig(), lambda handle: handle.ref)
    assert isinstance(policy, PaddedPolicy)


@pytest.mark.parametrize("count", [0, 1], ids=["no work", "text alone"])
def test_without_an_image_the_vision_tower_runs_and_learns_nothing(spec: PolicySpec, count: int) -> None:
    policy = load_policy(spec, TEMPERATURE, LearnerConfig(), lambda handle: handle.ref)
    ran: list[str] = []
    Family.vision_tower(policy.model).register_forward_hook(lambda *_: ran.append("vision"))
    text = [sampled_group(spec, np.random.default_rng(0), n=2, images=0)] * count
    batch = policy.collate(list(pieces(text, policy.layout, 1 << 20, padded=policy.padded)))
    logprobs, _ = policy(batch)
    assert len(logprobs) == max(1, sum(one.sampled_tokens for group in text for one in group.trajectories))
    (logprobs * batch.tokens.loss_mask).sum().backward()
    taught = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert ran and bool(taught) == bool(count) and not any("vision" in name for name in taught)


@pytest.mark.parametrize("name", ["llava_onevision", "llava", "idefics3", "qwen3_vl"])
def test_adapters_and_frozen_towers_find_their_layers(name: str, tmp_path: Any) -> None:
    spec = tiny_families.build(name, tmp_path)
    adapted = load_policy(spec, 1.0, LearnerConfig(lora=LoraConfig(rank=2)), lambda handle: handle.ref)
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all(re.search("language_model|text_model", n) and "lora_" in n for n in trained)
    tower = "linear_fc1" if name == "qwen3_vl" else "fc1"  # the vision tower's alone
    for targets, missing in ((("q_porj",), "q_porj"), (("q_proj", tower), tower)):
        unknown = LearnerConfig(lora=LoraConfig(rank=2, targets=targets))
        with pytest.raises(UserError, match=rf"learner\.lora\.targets: .* {missing} \(it has .*q_proj"):
            load_policy(spec, 1.0, unknown, lambda handle: handle.ref)
    frozen = load_policy(spec, 1.0, LearnerConfig(freeze_vision=True), lambda handle: handle.ref)
    assert {n for n, p in frozen.named_parameters() if not p.requires_grad} == {
        n for n, _ in frozen.named_parameters() if re.search(r"\.(vision_\w+|visual)\.", n)
    }


def test_a_family_of_ones_own_is_used(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner.families, "FAMILIES", Registry("model family"))
    monkeypatch.setattr(perception.families, "FAMILIES", Registry("model family"))

    class Mine(PaddedPolicy):
        def inputs(self, ids: Tensor, pictures: Sequence[Picture]) -> dict[str, Tensor]:
            return super().inputs(ids, pictures) | {"position_ids": torch.zeros_like(ids)}

    @learner.families.FAMILIES.register("llava")
    class MyFamily(Family):
        def policy(self, rows: Any) -> type[PaddedPolicy]:
            return Mine

        def picture(self, handle: ImageHandle) -> Picture:
            return super().picture(handle)

    perception.families.FAMILIES.register("llava")(perception.families.Family(frame="resized", native=True))
    assert family_of("llava").frame == "resized" and family_of("qwen2_5_vl").frame == "thousand"
    spec = tiny_families.build("llava", tmp_path)
    policy = load_policy(spec, 1.0, LearnerConfig(), lambda handle: handle.ref)
    assert isinstance(policy, Mine) and isinstance(policy.family, MyFamily)
    assert "position_ids" in policy.collate([]).inputs
    with pytest.raises(UserError, match="no model family 'lava'; did you mean 'llava'"):
        perception.families.FAMILIES["lava"]


def test_names_on_the_way_to_the_engine() -> None:
    renames = engine_renames("llava_onevision", "siglip_vision_model")
    long = "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    assert engine_name("model.vision_tower.encoder.layers.0.mlp.fc1.weight", renames) == long
    assert engine_name(long, renames) == long
    assert engine_name("model.language_model.norm.weight", renames) == "model.language_model.norm.weight"
    # Pixtral's tower in a LLaVA, InternVL's own and Qwen's have one name everywhere.
    for kind, tower in (("llava", "pixtral"), ("internvl", "internvl_vision"), ("qwen2_5_vl", None)):
        assert engine_renames(kind, tower) == ()


def test_the_answer_frames_of_the_released_models() -> None:
    frames = {name: family_of(name).frame for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "anything")}
    assert frames.pop("qwen2_5_vl") == "resized"
    assert set(frames.values()) == {"thousand"}
