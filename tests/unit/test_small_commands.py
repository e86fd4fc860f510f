"""Guards the settings of small commands (`launch.world`, `launch.sft`): typed, and a mistake is one line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.run.command_line import command, parse
from perception.config.fields import Positive
from perception.errors import UserError
from synthetic.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Small:
    """Settings of any small command."""

    out: Path
    steps: Positive = 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["out=x", "step=5"], "unknown key 'step'; did you mean 'steps'?"),
        (["out=x", "steps=many"], "steps='many': Input should be a valid integer"),
        (["out=x", "steps=0"], "steps=0: Input should be greater than 0"),
        (["steps=5"], "no value for out: give out=..."),
        (["out=x", "--help"], "unknown key '--help'"),
        (["out=[x"], "while parsing a flow sequence"),
    ],
)
def test_a_small_commands_mistake_is_named(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        parse(Small, words)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_a_small_command_runs_with_what_it_was_given(command_line: Any, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Small] = []
    assert command_line(lambda: command(Small, seen.append), "out=a/b", "steps=5") == 0
    assert seen == [Small(out=Path("a/b"), steps=5)]
    assert command_line(lambda: command(World, seen.append), "trian=5") == 2
    assert capsys.readouterr().err == "error: unknown key 'trian'; did you mean 'train'?\n"


def test_the_world_is_written_as_asked(tmp_path: Path, command_line: Any) -> None:
    assert command_line(lambda: command(World, World.write), f"out={tmp_path}", "train=2", "eval=1", "side=112") == 0
    counts = {
        name: len(yaml.safe_load((tmp_path / f"{name}.json").read_text())["images"])
        for name in ("train", "eval", "shifted")
    }
    assert counts == {"train": 2, "eval": 1, "shifted": 1}
