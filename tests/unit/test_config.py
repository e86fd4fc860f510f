"""Settings: every key of the typed config can be set from the command line, and every mistake names what was meant."""

from __future__ import annotations

from functools import cache

import hydra
import pytest
from omegaconf import OmegaConf

from launch.run.config import CONF, compose, valid_keys
from perception.config import Config
from perception.errors import UserError


@cache
def config(*overrides: str) -> Config:
    return compose(["run.name=test", *overrides])


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (CONF / "recipe").glob("*.yaml")))
def test_every_recipe_is_valid(recipe: str) -> None:
    assert config(f"recipe={recipe}").run.name == "test"


@pytest.mark.parametrize("group", ["reward", "placement", "task"])
def test_every_choice_of_a_group_is_valid(group: str) -> None:
    for path in (CONF / group).glob("*.yaml"):
        if path.stem != "base":
            config(f"{group}={path.stem}")


def test_every_typed_setting_stands_in_the_yaml_so_that_it_can_be_overridden() -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        tree = OmegaConf.to_container(hydra.compose("config", ["run.name=test"]), resolve=True)

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
    learner = config("learner.lr=2e-5", "learner.zero_stage=3").learner
    assert (learner.lr, learner.zero_stage, learner.ranks) == (2e-5, 3, 2)


@pytest.mark.parametrize(
    "reward", sorted(path.stem for path in (CONF / "reward").glob("*.yaml") if path.stem != "base")
)
def test_a_reward_is_the_same_however_the_policy_looks_and_chooses_no_look(reward: str) -> None:
    plain = config(f"reward={reward}")
    assert plain.look.mode == "none"
    for mode in ("inline", "relook"):
        assert config(f"reward={reward}", f"look={mode}").reward == plain.reward


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learner.lr=abc", "learner.lr='abc'"),
        ("learner.lr=-1", "greater than 0"),
        ("learner.ranks=2.5", "learner.ranks=2.5"),
        ("+learner.foo=1", "unknown key 'learner.foo'"),
        ("learner.foo=1", "config: Could not override 'learner.foo'"),
        ("reward=none_such", "config: In 'config': Could not find 'reward/none_such'"),
        ("algorithm.group_size=1", "greater than or equal to 2"),
        ("rollout.temperature=3", "less than or equal to 2"),
        ("placement.device=tpu", "'cpu' or 'cuda'"),
    ],
)
def test_an_ill_typed_value_is_one_line_that_names_it(override: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        config(override)
    assert said in str(error.value) and "\n" not in str(error.value)
