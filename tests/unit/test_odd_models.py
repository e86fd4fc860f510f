"""Guards that a policy's odd files are one line before anything starts, whatever transformers makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.run import checks, memory
from launch.run.models import reading
from launch.run.samples import make_prompts
from perception.errors import DataError, UserError
from tests import builders
from tests.builders import changed

ODD: tuple[Any, ...] = (["x"], "x", -1)
"""Values of the types that JSON has, none of which is right."""
FIELDS = {
    "config.json": ("model_type", "text_config", "vision_config", "architectures", "text_config.vocab_size"),
    "processor_config.json": ("image_processor", "image_processor.size", "image_processor.image_processor_type"),
    "tokenizer_config.json": ("tokenizer_class", "chat_template", "eos_token", "added_tokens_decoder"),
    "tokenizer.json": ("model", "added_tokens"),
}


def edited(content: Any, key: str, value: Any) -> Any:
    """The JSON object with the value at a dotted key."""
    name, _, rest = key.partition(".")
    return content | {name: edited(content[name], rest, value) if rest else value}


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(checks, "check_resources", lambda config: None)  # however small this machine is
    shutil.copytree("assets/policy", tmp_path / "policy")
    return tmp_path / "policy"


def told(policy: Path) -> str | None:
    """What the checks before a run say of the policy's files; None: nothing is wrong with them."""
    config = changed(changed(builders.config(policy), "model", path=str(policy)), "rollout", max_model_len=512)
    try:
        checks.check_machine(config, say=lambda line: None)
        make_prompts(config)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, keys in FIELDS.items() for key in keys])
def test_an_odd_value_is_one_line_or_no_matter(policy: Path, file: str, key: str) -> None:
    whole = json.loads((policy / file).read_text())
    for odd in ODD:
        (policy / file).write_text(json.dumps(edited(whole, key, odd)))
        if (line := told(policy)) is not None:
            assert "\n" not in line and str(policy) in line, (odd, line)


def test_the_files_as_they_are_pass(policy: Path) -> None:
    assert told(policy) is None


@pytest.mark.parametrize(
    "template", ["{{ 1 + 'x' }}", "{{ messages.x.y }}", "{% for %}", "{{ messages[9]['x'] }}", "x"]
)
def test_a_broken_chat_template_is_one_line(policy: Path, template: str) -> None:
    (policy / "chat_template.jinja").write_text(template)
    line = told(policy)
    assert line is not None and "\n" not in line and line.startswith(f"model.path={policy}: no prompt can be built: ")


@pytest.mark.parametrize(
    "error", [TypeError("a\nb"), AttributeError("a b"), KeyError("a"), ZeroDivisionError(), Exception("x")]
)
def test_whatever_is_raised_names_the_policy(error: Exception) -> None:
    with pytest.raises(UserError) as caught, reading("runs/policy"):
        raise error
    line = str(caught.value)
    assert line.startswith("model.path=runs/policy: its files cannot be used: ") and "\n" not in line
    assert line.endswith(f"({type(error).__name__})")


@pytest.mark.parametrize("error", [UserError("mended thus"), DataError("line 3")])
def test_what_is_one_line_already_stays_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error), match=f"^{error}$"), reading("runs/policy"):
        raise error


def test_the_memory_model_reads_them_too(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object) -> None:
        raise AttributeError("'str' object has no attribute 'to_dict'")

    monkeypatch.setattr(memory, "measure", broken)
    assert "AttributeError" in str(told(policy))
