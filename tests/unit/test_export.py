"""Guards the exported policy: whatever its source brought along, it is written whole, and what training does not change
is the source's to the last byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from launch.record.card import write_card
from learner.export import export, try_export
from learner.policy import Policy, load_policy
from learner.weights import WeightSender, weights
from perception.config import LearnerConfig, LoraConfig
from perception.errors import UserError
from perception.types import ImageHandle
from tests import builders, fake_run, tiny_families
from tests.builders import changed

LORA = LoraConfig(rank=4, alpha=8)
SHIPPED = {
    "none": None,
    "valid": {"eos_token_id": [258, 257], "do_sample": True, "temperature": 0.7},
    "refused by transformers": {"eos_token_id": 258, "do_sample": False, "temperature": 1e-6, "top_p": 0.001},
    "of a later version": {"eos_token_id": 258, "brand_new": [1]},
}


def no_image(handle: ImageHandle) -> bytes:
    raise AssertionError(handle)


def policy(folder: Path, lora: LoraConfig, family: str = "qwen2_5_vl") -> Policy:
    spec = tiny_families.build(family, folder)
    return load_policy(spec, 1.0, LearnerConfig(lora=lora), no_image)


def sender(trained: Policy, lora: LoraConfig) -> WeightSender:
    config = LearnerConfig(lora=lora)
    return WeightSender(weights(trained.model), config, rank=0, device=torch.device("cpu"), transport="store")


@pytest.mark.parametrize("shipped", SHIPPED.values(), ids=SHIPPED)
def test_whatever_generation_settings_the_source_ships(shipped: dict[str, object] | None, tmp_path: Path) -> None:
    spec = tiny_families.build("qwen2_5_vl", tmp_path / "source")
    settings = tmp_path / "source" / "generation_config.json"
    settings.unlink()
    if shipped is not None:
        settings.write_text(json.dumps(shipped))
    trained = load_policy(spec, 1.0, LearnerConfig(), no_image)
    try_export(trained)
    with torch.no_grad():
        for parameter in trained.model.parameters():
            parameter.add_(0.5)
    out = tmp_path / "out"
    export(trained, sender(trained, LoraConfig()).whole(), out, LoraConfig(), {})
    own = {"config.json", "model.safetensors"}
    files = {file.name for file in (tmp_path / "source").iterdir()}
    assert {file.name for file in out.iterdir()} == files
    for name in files - own:
        assert (out / name).read_bytes() == (tmp_path / "source" / name).read_bytes(), name
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "source", out))
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[name], before[name] + 0.5) for name in before)
    assert AutoProcessor.from_pretrained(out).tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision"])
def test_adapters_are_an_export_of_their_own(family: str, tmp_path: Path) -> None:
    trained = policy(tmp_path / "source", LORA, family)
    torch.manual_seed(0)
    for name, parameter in trained.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    own = sender(trained, LORA)
    export(trained, own.whole(), tmp_path / "out", LORA, own.adapters())
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    start = AutoModelForImageTextToText.from_pretrained(tmp_path / "source")
    moved = {name: value.clone() for name, value in start.named_parameters()}
    adapted = PeftModel.from_pretrained(start, tmp_path / "out" / "adapter").merge_and_unload()
    found = dict(adapted.named_parameters())
    assert found.keys() == dict(merged.named_parameters()).keys()
    for name, value in merged.named_parameters():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    assert sum(not torch.equal(value, moved[name]) for name, value in found.items()) >= 7
    settings = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)
    assert settings["base_model_name_or_path"] == str(tmp_path / "source")


def test_what_could_not_be_saved_is_told_before_the_first_step(tmp_path: Path) -> None:
    trained = policy(tmp_path / "source", LoraConfig())
    (tmp_path / "source" / "chat_template.jinja").unlink()
    (tmp_path / "source" / "chat_template.jinja").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"model\.path=.*could not be saved: .*gone|chat_template") as told:
        try_export(trained)
    assert "\n" not in str(told.value)


def test_the_card_says_where_it_comes_from_and_how_it_is_asked(tmp_path: Path) -> None:
    run = fake_run.write_run(tmp_path, steps=3)
    settings = builders.config(tmp_path, "mine")
    write_card(tmp_path, settings, json.loads((run / "summary.json").read_text()))
    card = (tmp_path / "README.md").read_text()
    head = card.split("---")[1]
    assert f"base_model: {settings.model.path}\n" in head and "library_name: transformers" in head
    cached = changed(settings, "model", path="/cache/hub/models--some-lab--Tiny-VL/snapshots/abc")
    write_card(tmp_path, cached, json.loads((run / "summary.json").read_text()))
    assert "base_model: some-lab/Tiny-VL\n" in (tmp_path / "README.md").read_text()
    assert "# mine" in card and "3 GRPO steps" in card and card.count("\n| ") >= 3
    assert all(task.template in card for task in settings.task.values())
