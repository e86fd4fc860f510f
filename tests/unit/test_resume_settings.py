"""Guards that a run is resumed by its own settings, with what is given on top, and every difference said."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from launch.run.config import changes, compose, entry, plain
from perception.config import Config
from tests.builders import changed

OWN = ("reward=vision_reasoner", "learner.lr=3e-5", "algorithm=gspo", "run.seed=7", "data.also.shifted=other.json")
"""What the run was started with, besides its recipe."""


@pytest.fixture(scope="module")
def composed() -> Config:
    return compose(["recipe=quickstart", *OWN, "run.name=first", "run.resume_weights=x"])


@pytest.fixture
def before(composed: Config, tmp_path: Path) -> Config:
    config = changed(composed, "run", output=str(tmp_path))
    (tmp_path / "first").mkdir()
    (tmp_path / "first/config.yaml").write_text(yaml.safe_dump(plain(config)))
    return config


def resumed(before: Config, *words: str) -> Config:
    return compose(["run.resume=first", f"run.output={before.run.output}", *words])


@pytest.mark.parametrize("by", ["name", "path"])
def test_a_run_is_resumed_by_its_own_settings_without_a_recipe(before: Config, by: str) -> None:
    path = f"{before.run.output}/first"
    found = resumed(before) if by == "name" else compose([f"run.resume={path}"])
    assert plain(found) == plain(before)
    assert found.run.resume == ("first" if by == "name" else path)
    assert changes(found) == []
    assert compose(["recipe=quickstart"]).learner.lr == 1e-4, "and the next one is not"


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["learner.lr=1e-6"], ["changed: learner.lr=1e-06, was 3e-05"]),
        (["learner.lr=3e-5"], []),
        (["data.also.further=a.json"], ["changed: data.also.further=a.json, was None"]),
        (["~data.also.shifted"], ["changed: data.also.shifted=None, was other.json"]),
        (["run.new_data=true", "data.train=b.json"], ["changed: data.train=b.json, was assets/world/train.json"]),
        (["learner.ranks=1", "run.seed=8"], ["changed: run.seed=8, was 7", "changed: learner.ranks=1, was 2"]),
    ],
)
def test_what_is_given_goes_on_top_and_is_said(before: Config, words: list[str], lines: list[str]) -> None:
    said = [line.replace(before.data.train, "assets/world/train.json") for line in changes(resumed(before, *words))]
    assert sorted(said) == sorted(lines)


def test_a_group_that_is_chosen_replaces_the_group(before: Config) -> None:
    found, fresh = resumed(before, "reward=quickstart"), compose(["recipe=quickstart"])
    assert found.reward == fresh.reward and found.learner == before.learner and found.algorithm == before.algorithm
    assert {line.split("=")[0].removeprefix("changed: ").split(".")[0] for line in changes(found)} == {"reward"}


def test_a_recipe_replaces_it_all(before: Config) -> None:
    found = resumed(before, "recipe=quickstart")
    assert found.learner.lr == 1e-4 and found.reward.name == "quickstart"
    assert "changed: learner.lr=0.0001, was 3e-05" in changes(found)


def test_a_new_run_has_no_differences(before: Config) -> None:
    assert changes(before) == []


@pytest.mark.parametrize(
    ("content", "words", "said"),
    [
        (None, ["run.resume=absent"], "run.resume=absent: no run there"),
        (None, ["run.resume=20240501"], "run.resume=20240501: no run there"),
        (None, ["run.resume=first", "learner.lrr=1"], "unknown key 'learner.lrr'; did you mean 'learner.lr'?"),
        ("a: [", ["run.resume=first"], "config.yaml cannot be read: "),
        ("", ["run.resume=first"], "config.yaml cannot be read: "),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    before: Config,
    content: str | None,
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = Path(before.run.output)
    if content is not None:
        (output / "first/config.yaml").write_text(content)
    monkeypatch.setattr(sys, "argv", ["train", *words, f"run.output={output}"])
    with pytest.raises(SystemExit) as end:
        entry(lambda config: pytest.fail("it started"))
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ") and said in err and err.count("\n") == 1


def test_the_command_line_resumes(before: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Config] = []
    monkeypatch.setattr(sys, "argv", ["train", "run.resume=first", f"run.output={before.run.output}", "run.seed=9"])
    with pytest.raises(SystemExit) as end:
        entry(found.append)
    assert end.value.code == 0 and changes(found[0]) == ["changed: run.seed=9, was 7"]
