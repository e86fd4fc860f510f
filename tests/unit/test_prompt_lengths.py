"""Guards the longest prompt before anything starts: text, image tokens, a template that shows the image."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launch.run import checks as preflight
from launch.run.prompts import PromptMaker
from perception.config import ModelConfig
from perception.errors import UserError
from perception.types import Sample
from tests import builders, tiny_policy
from tests.builders import changed, config
from tests.tiny_families import build


def sample(i: int, question: str = "the red circle", side: int = 112) -> Sample:
    return builders.sample(f"s{i}", question=question, height=side, width=side)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_policy.build(tmp_path_factory.mktemp("tiny")).path)


@pytest.mark.parametrize(("side", "tokens"), [(112, 16), (224, 64), (28, 4), (2000, 64)])
def test_image_tokens(tiny: Path, side: int, tokens: int) -> None:
    assert PromptMaker(ModelConfig(path=str(tiny), segmenter=""), {}).image_tokens(side, side) == tokens


def test_the_longest_prompt_must_fit(tiny: Path, tmp_path: Path) -> None:
    settings = changed(config(tmp_path), "model", path=str(tiny))
    samples = [sample(0), sample(1, question="x" * 100), sample(2, side=224)]
    # One token per byte: system 15, user 5, question 106, assistant 10, two line ends, seven chat tokens.
    text = 15 + 5 + 106 + 10 + 2 + 7
    needed = text + 64 + 64  # the 224 px image, max_new_tokens
    preflight.check_lengths(changed(settings, "rollout", max_model_len=needed), samples)
    with pytest.raises(UserError, match=rf"raise it to {needed} = {text} text tokens \(s1\) \+ 64 image tokens"):
        preflight.check_lengths(changed(settings, "rollout", max_model_len=needed - 1), samples)


@pytest.mark.parametrize("family", ["llava_onevision", "internvl"])
def test_the_longest_prompt_of_a_family_without_a_formula(family: str, tmp_path: Path) -> None:
    settings = changed(config(tmp_path), "model", path=build(family, tmp_path / "policy").path)
    samples = [sample(0, question="x" * 20), sample(1)]
    # One token per character of "You see. USER: <image>\nFind xxx...x. ASSISTANT:", the image's one left out, and the
    # first token and the space before it.
    text = 2 + len("You see. USER: \nFind . ASSISTANT:") + 20
    image = {"llava_onevision": 88, "internvl": 22}[family]
    preflight.check_lengths(changed(settings, "rollout", max_model_len=text + image + 64), samples)
    with pytest.raises(UserError, match=rf"raise it to {text + image + 64} = {text} text .* {image} image tokens"):
        preflight.check_lengths(changed(settings, "rollout", max_model_len=text + image + 63), samples)


def test_a_chat_template_that_does_not_show_the_image_is_refused(tiny: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    shutil.copytree(tiny, policy)
    (policy / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] }}{% endfor %}")
    settings = changed(config(tmp_path), "model", path=str(policy))
    with pytest.raises(UserError, match="chat template shows 0 images for one"):
        preflight.check_lengths(settings, [sample(0)])
    (policy / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    with pytest.raises(UserError, match="no prompt can be built: no system role"):
        preflight.check_lengths(settings, [sample(0)])
