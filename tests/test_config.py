"""Settings: every key of the typed config can be set from the command line, and every mistake names what was meant."""

from __future__ import annotations

import subprocess
import sys

import hydra
import pytest
from omegaconf import OmegaConf

from launch.config import CONF, valid_keys, validate
from launch.errors import UserError


def compose(*overrides: str):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", overrides=["run.name=test", *overrides])


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (CONF / "recipe").glob("*.yaml")))
def test_every_recipe_is_valid(recipe: str) -> None:
    assert validate(compose(f"recipe={recipe}")).run.name == "test"


@pytest.mark.parametrize("group", ["reward", "placement", "task"])
def test_every_choice_of_a_group_is_valid(group: str) -> None:
    for path in (CONF / group).glob("*.yaml"):
        if path.stem != "base":
            validate(compose(f"{group}={path.stem}"))


def test_every_typed_setting_stands_in_the_yaml_so_that_it_can_be_overridden() -> None:
    tree = OmegaConf.to_container(compose(), resolve=True)

    def stands(key: str) -> bool:
        here = tree
        for part in key.split("."):
            if here is None:  # an optional part that is switched off as a whole
                return True
            if part not in here:
                return False
            here = here[part]
        return True

    assert [key for key in valid_keys() if not stands(key)] == []


def test_the_recipe_yields_to_the_command_line() -> None:
    config = validate(compose("learner.lr=2e-5", "learner.zero_stage=3"))
    assert (config.learner.lr, config.learner.zero_stage, config.learner.ranks) == (2e-5, 3, 2)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learner.lr=abc", "learner.lr='abc'"),
        ("learner.lr=-1", "greater than 0"),
        ("learner.ranks=2.5", "learner.ranks=2.5"),
        ("+learner.foo=1", "unknown key 'learner.foo'"),
        ("algorithm.group_size=1", "greater than or equal to 2"),
        ("rollout.temperature=3", "less than or equal to 2"),
        ("placement.device=tpu", "'cpu' or 'cuda'"),
    ],
)
def test_an_ill_typed_value_is_one_line_that_names_it(override: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        validate(compose(override))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("learner.lrr=1", "error: config: unknown key 'learner.lrr'; did you mean 'learner.lr'?"),
        ("recipe=nope", "Available options in 'recipe'"),
    ],
)
def test_a_mistake_on_the_command_line_exits_2_with_one_line(argument: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", argument], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
