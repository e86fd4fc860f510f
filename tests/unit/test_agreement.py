"""Guards that a policy's files which contradict one another, or the settings, are one line before anything starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.models.smolvlm import processing_smolvlm

from launch.run import checks
from launch.run.samples import make_prompts
from perception.config import Config
from perception.errors import UserError
from tests import builders, tiny_families
from tests.builders import changed

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl")


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_families.build(request.param, tmp_path_factory.mktemp(request.param)).path)


@pytest.fixture
def policy(source: Path, tmp_path: Path) -> Path:
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    return tmp_path


def edit(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | values))


def text(policy: Path, **values: Any) -> None:
    """Change settings of the language model."""
    config = json.loads((policy / "config.json").read_text())
    edit(policy / "config.json", text_config=config["text_config"] | values)


def rows(policy: Path) -> int:
    return int(json.loads((policy / "config.json").read_text())["text_config"]["vocab_size"])


def kind(policy: Path) -> str:
    return str(json.loads((policy / "config.json").read_text())["model_type"])


def settings(policy: Path, **rollout: Any) -> Config:
    return changed(changed(builders.config(policy), "model", path=str(policy), answer_frame=None), "rollout", **rollout)


def refused(config: Config, words: str) -> None:
    with pytest.raises(UserError, match=words) as told:
        make_prompts(config)
    assert "\n" not in str(told.value) and str(told.value).startswith(f"model.path={config.model.path}: ")


def test_what_agrees_passes(policy: Path) -> None:
    make_prompts(settings(policy, max_model_len=4096))


def test_a_placeholder_of_another_id_than_an_images_tokens_passes(tmp_path: Path) -> None:
    spec = tiny_families.build("gemma3", tmp_path)
    maker = make_prompts(settings(tmp_path, max_model_len=4096))
    assert maker.config.image_token_id != maker.image_token_id == spec.image_token_id
    assert {maker.config.image_token_id, maker.image_token_id} <= {*maker.marks}


def test_smolvlm_names_the_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    tiny_families.build("smolvlm", tmp_path)
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    refused(settings(tmp_path), r"no prompt can be built: .* `pip install num2words`")


def test_positions_against_max_model_len(policy: Path) -> None:
    refused(settings(policy, max_model_len=4097), r"max_model_len=4097, but config\.json has 4096 positions")
    rope = json.loads((policy / "config.json").read_text())["text_config"].get("rope_parameters") or {}
    for kind, places in (("linear", 8192), ("yarn", 4096)):  # yarn's positions are already stretched, as in vLLM
        text(policy, rope_parameters=rope | {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4})
        make_prompts(settings(policy, max_model_len=places))
        refused(settings(policy, max_model_len=places + 1), f"has {places} positions")


def test_vocabulary_rows_against_the_largest_id(policy: Path) -> None:
    largest = rows(policy) - 1  # the tiny policies have a row for every token
    text(policy, vocab_size=largest + 500)
    make_prompts(settings(policy))
    text(policy, vocab_size=largest)
    refused(settings(policy), rf"tokenizer\.json has id {largest}, but config\.json a vocabulary of {largest} rows")


def test_banned_ids_are_inside_the_vocabulary(policy: Path) -> None:
    edit(policy / "config.json", video_token_id=rows(policy) + 7)
    refused(settings(policy), rf"names ids \[{rows(policy) + 7}\], beyond the vocabulary of {rows(policy)} rows")


def test_the_image_token_of_config_and_tokenizer(policy: Path) -> None:
    edit(policy / "config.json", image_token_id=1)
    refused(settings(policy), r"image_token_id=1 in config\.json, \d+ in tokenizer\.json")


ENDS: dict[str, Callable[[str, str], str]] = {
    "no token": lambda template, end: template.replace(end, "<|the_end|>"),
    "the last one of another model": lambda template, end: template.replace(end, " [/INST]\n"),
}


@pytest.mark.parametrize("broken", ENDS.values(), ids=ENDS)
def test_a_turn_ends_with_a_token_that_ends_generation(policy: Path, broken: Callable[[str, str], str]) -> None:
    end = "<|im_end|>" if "qwen" in kind(policy) else "</s>"
    file = policy / "chat_template.jinja"
    assert end in file.read_text()
    file.write_text(broken(file.read_text(), end))
    refused(settings(policy), "the chat template ends a turn with '.*', which is no token: no answer would end")


def test_a_turn_may_end_with_nothing_where_the_tokenizer_has_an_end(policy: Path) -> None:
    file = policy / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_end|>", "").replace("</s>", ""))
    make_prompts(settings(policy))
    tokenizer = policy / "tokenizer_config.json"
    tokenizer.write_text(json.dumps({k: v for k, v in json.loads(tokenizer.read_text()).items() if k != "eos_token"}))
    refused(settings(policy), "neither tokenizer nor chat template has an end of turn")


def test_limits_of_an_image_that_exclude_each_other(policy: Path) -> None:
    if "qwen" in kind(policy):  # the other families refuse both settings by name
        few = changed(settings(policy), "model", max_pixels=3000)
        refused(few, "images get 3136 pixels at least, 3000 at most")


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantised_weights_are_refused(policy: Path, key: str) -> None:
    checks.check_model(settings(policy).model)
    edit(policy / "config.json", **{key: {"quant_method": "awq", "bits": 4}})
    with pytest.raises(UserError, match=r"model\.path=.*quantised") as told:
        checks.check_model(settings(policy).model)
    assert "\n" not in str(told.value)


def test_the_answer_frame_is_one_that_the_family_has(policy: Path) -> None:
    config = changed(settings(policy), "model", answer_frame="resized")
    if kind(policy) == "qwen2_5_vl":
        checks.check_family(config)
    else:
        with pytest.raises(UserError, match=rf"answer_frame=resized: {kind(policy)} answers in 0\.\.1000"):
            checks.check_family(config)
    checks.check_family(changed(config, "model", answer_frame="thousand"))
