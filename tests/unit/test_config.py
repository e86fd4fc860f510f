"""Settings: what stands where, that every key can be set from the command line, and what is said of a mistake."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from omegaconf import OmegaConf

from docs import config_reference
from launch.record import run_directory
from launch.run.command_line import leaves, valid_keys
from launch.run.config import CONF, compose, defaults, entry, plain
from perception.config import Config, EcdfConfig, TaskConfig
from perception.errors import UserError

GROUPS = ("model", "data", "task", "look", "reward", "algorithm", "placement")
RECIPES = ("dr_seg", "dr_seg_3b", "dr_seg_3b_lora", "quickstart", "shape_3b")
OWN = ("model.path=policy", "model.segmenter=sam2", "data.train=train.jsonl", "data.eval=eval.jsonl")
"""What the recipes of Dr. Seg leave to the user."""


@cache
def config(*overrides: str) -> Config:
    return compose(["recipe=quickstart", *overrides])


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


# ---------------------------------------------------------------- what stands where


def test_every_recipe_is_valid_and_names_its_run() -> None:
    assert choices("recipe") == list(RECIPES)
    for recipe in RECIPES:
        own = OWN if recipe.startswith("dr_seg") else ()
        assert compose([f"recipe={recipe}", *own]).run.name == recipe


def test_every_choice_of_a_group_is_valid() -> None:
    """The first choice of every group together, the second ones, and so on."""
    for row in zip_longest(*([f"{group}={choice}" for choice in choices(group)] for group in GROUPS)):
        config(*filter(None, row), *OWN)


def test_every_typed_setting_can_be_overridden() -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        tree = OmegaConf.to_container(hydra.compose("config", ["recipe=quickstart"]))

    def stands(key: str) -> bool:
        here = tree
        for part in key.split("."):
            if part not in here:
                return False
            here = here[part]
        return True

    assert [key for key in valid_keys(Config) if not stands(key)] == []


def written(group: str, choice: str) -> tuple[dict[str, Any], list[Any]]:
    """What a file of conf/ says by itself, and its defaults list."""
    tree = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text()) or {}
    return tree, tree.pop("defaults", [])


def is_global(group: str) -> bool:
    """Whether the files of this group name whole rooms, as recipes do."""
    return group in ("recipe", "placement")


def laid(group: str, choice: str) -> dict[str, Any]:
    """A file of conf/ alone, where it is put."""
    own = written(group, choice)[0]
    return own if is_global(group) else {group: own}


def beneath(group: str, choice: str, base: Any = None) -> Any:
    """What a file of conf/ is laid over: typed defaults, and the files that it names."""
    base = OmegaConf.create(defaults(Config)) if base is None else base
    for line in written(group, choice)[1]:
        if isinstance(line, dict):  # override /GROUP: CHOICE
            ((where, other),) = line.items()
            base.merge_with(laid(where.removeprefix("override /"), other))
        elif line != "_self_":
            beneath(group, line, base).merge_with(laid(group, line))
    return base


@pytest.mark.parametrize("group", [*GROUPS, "recipe"])
def test_no_yaml_key_repeats_what_it_is_laid_over(group: str) -> None:
    for choice in choices(group):
        known = dict(leaves(OmegaConf.to_container(beneath(group, choice))))
        repeated = [
            f"{group}/{choice}: {key}={value}"
            for key, value in leaves(laid(group, choice))
            if key in known and OmegaConf.create([value]) == OmegaConf.create([known[key]])
        ]
        assert repeated == []


def test_the_test_above_sees_a_repetition() -> None:
    known = dict(leaves(OmegaConf.to_container(beneath("reward", "dr_seg_paper"))))
    assert known["reward.ecdf.aggregate"] == "sum" and known["reward.ecdf.digits"] == 1  # typed; of reward=dr_seg
    known = dict(leaves(OmegaConf.to_container(beneath("recipe", "dr_seg_3b_lora"))))
    assert known["placement.transport"] == "ipc" and known["model.dtype"] == "bfloat16"  # of placement=one_gpu
    assert known["run.name"] == "dr_seg_3b" and known["algorithm.steps"] == 500  # of the two recipes below it


def test_every_setting_has_a_sentence_and_the_reference_is_current() -> None:
    said = config_reference.sentences()
    assert [
        (kind.__name__, one.name)
        for _, kind, one in config_reference.settings()
        if not said.get((kind.__name__, one.name))
    ] == []
    assert config_reference.PAGE.read_text() == config_reference.reference(), "run `make docs`"


def test_the_reference_tells_type_bounds_default_and_sentence() -> None:
    rows = config_reference.reference().splitlines()
    steps = "| `look.explore` | number >= 0, <= 1 | `0.1` | While training: share of the confident answers"
    assert any(row.startswith(steps) for row in rows)
    assert any(row.startswith("| `placement.device` | `cpu`, `cuda` | required | ") for row in rows)
    documented = {key for row in rows for key in row.split(" | ")[0].strip("| ").replace("`", "").split("<br>")}
    assert set(valid_keys(Config)) <= documented


# ---------------------------------------------------------------- composing


def test_a_placement_says_how_many_ranks_and_which_dtype_suit_it() -> None:
    def chosen(*overrides: str) -> tuple[int, str]:
        return config(*overrides).learner.ranks, config(*overrides).model.dtype

    assert chosen() == chosen("placement=cpu") == (2, "float32")
    assert chosen("placement=one_gpu") == chosen("placement=cluster") == (1, "bfloat16")
    assert chosen("placement=one_gpu", "learner.ranks=3", "model.dtype=float32") == (3, "float32")
    four = compose(["recipe=dr_seg", "placement=one_gpu", *OWN]).learner.ranks
    assert four == 4, "what a recipe says of itself wins"


def test_the_command_line_has_the_last_word() -> None:
    learner = config("learner.lr=2e-5", "learner.zero_stage=3").learner
    assert (learner.lr, learner.zero_stage, learner.ranks) == (2e-5, 3, 2)
    assert compose(["recipe=quickstart", "recipe=shape_3b"]).run.name == "shape_3b"


def test_open_mappings_take_new_keys_without_a_plus() -> None:
    task = "{system: s, template: t, inline: i, again: a}"
    found = config(
        "reward.components.look=0.5",
        "reward.ranked.point_score={weight: 0.3, alpha: 2}",
        "data.also.harder=other.json",
        "data.options.split.name=val",
        f"task.mine={task}",
        "plugins=[mine,theirs.py]",
    )
    assert found.reward.components == config().reward.components | {"look": 0.5}
    assert found.reward.ranked == {"point_score": {"weight": 0.3, "alpha": 2}}
    assert (found.data.also, found.data.options) == ({"harder": "other.json"}, {"split": {"name": "val"}})
    assert found.task["mine"] == TaskConfig(system="s", template="t", inline="i", again="a")
    assert found.plugins == ("mine", "theirs.py")


def test_looking_changes_no_reward_and_a_reward_no_look() -> None:
    found = [config("reward=dr_seg", f"look={mode}") for mode in ("none", "inline", "relook")]
    assert [one.look.mode for one in found] == ["none", "inline", "relook"]
    assert found[0].reward == found[1].reward == found[2].reward
    for reward in choices("reward"):
        assert set(written("reward", reward)[1]) <= {*choices("reward"), "_self_"}


def test_dr_seg_without_looks_is_dr_seg_but_for_that_component() -> None:
    whole, rest = config("reward=dr_seg").reward, config("reward=dr_seg_no_look").reward
    assert whole.components == {"think_format": 1, "answer_format": 1, "look": 1, "non_repeat": 1}
    assert rest == replace(
        whole, name="dr_seg_no_look", components={"think_format": 1, "answer_format": 1, "non_repeat": 1}
    )


def test_the_published_recipe_has_the_published_values() -> None:
    """Dr. Seg's training_scripts/drseg_7b.yaml and run_drseg_7b_4x80G.sh."""
    found = compose(["recipe=dr_seg", *OWN])
    learner, algorithm, rollout = found.learner, found.algorithm, found.rollout
    assert (learner.lr, learner.schedule, learner.weight_decay, learner.betas) == (1e-6, "constant", 1e-2, (0.9, 0.999))
    assert (learner.grad_clip, learner.ranks, learner.checkpointing, found.model.dtype) == (1.0, 4, "on", "bfloat16")
    assert (algorithm.prompts_per_step, algorithm.group_size, algorithm.updates, algorithm.scale) == (16, 8, 1, "group")
    assert (algorithm.kl, algorithm.kl_in, algorithm.kl_coef, algorithm.entropy_coef) == ("k3", "loss", 1e-2, 1e-3)
    assert (rollout.temperature, rollout.max_new_tokens, rollout.max_model_len) == (1.0, 3000, 1300 + 3000)
    assert (found.look.mode, found.reward.name, found.run.seed) == ("inline", "dr_seg", 42)
    expected = EcdfConfig(initial_zero_rows=128, ties="le", digits=1, warmup=0, exclude_unparsed=False, per_task=False)
    assert found.reward.ecdf == expected and found.reward.ecdf.capacity == 2048


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learner.lr=abc", "learner.lr='abc': Input should be a valid number"),
        ("learner.lr=-1", "learner.lr=-1: Input should be greater than 0"),
        ("learner.ranks=2.5", "learner.ranks=2.5"),
        ("learner.lrr=1", "unknown key 'learner.lrr'; did you mean 'learner.lr'?"),
        ("+learner.lrr=1", "unknown key 'learner.lrr'; did you mean 'learner.lr'?"),
        ("learnr.lr=1", "unknown key 'learnr.lr'; did you mean 'learner.lr'?"),
        ("resume=last", "unknown key 'resume'; did you mean 'run.resume'?"),
        ("data.world_sde=3", "unknown key 'data.world_sde'; did you mean 'data.world_side'?"),
        ("reward=none_such", "reward=none_such: no such choice; there are box_soft_f1, "),
        ("reward.components.mask_iou=much", "reward.components.mask_iou='much': Input should be a valid number"),
        ("algorithm.group_size=1", "greater than or equal to 2"),
        ("rollout.temperature=3", "less than or equal to 2"),
        ("placement.device=tpu", "'cpu' or 'cuda'"),
        ("task.mine.system=s", "no value for task.mine.template: give task.mine.template=..."),
        ("run.name=${nothing}", "Interpolation key 'nothing' not found"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(override: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        config(override)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_what_nobody_gave_is_named() -> None:
    with pytest.raises(UserError) as error:
        compose(["recipe=dr_seg", "model.path=policy"])
    assert str(error.value).startswith("no value for data.eval, model.segmenter: give data.eval=...")


def test_without_a_recipe_all_are_listed_with_a_line_each() -> None:
    with pytest.raises(UserError) as error:
        compose(["learner.lr=1e-5"])
    head, *lines = str(error.value).splitlines()
    assert "recipe=NAME" in head and [line.split()[0] for line in lines] == list(RECIPES)
    assert lines[3].endswith("  The demo: minutes on two CPU cores. `make demo` runs it.")


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["recipe=quickstart", "learner.lrr=1"], 2, "error: unknown key 'learner.lrr'; did you mean 'learner.lr'?\n"),
        (["recipe=nope"], 2, "error: recipe=nope: no such choice; there are " + ", ".join(RECIPES) + "\n"),
        (["recipe=quickstart", "algorithm.steps=0"], 2, "error: algorithm.steps=0: Input should be greater than 0\n"),
        (["recipe=quickstart", "algorithm.steps=3"], 0, ""),
    ],
)
def test_a_mistake_on_the_command_line_exits_2_with_one_line(
    words: list[str], status: int, said: str, command_line: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(lambda: entry(lambda config: None), *words) == status
    assert capsys.readouterr().err == said


def test_the_program_without_a_recipe_exits_2_and_lists_them(
    command_line: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(lambda: entry(lambda config: None)) == 2
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["error:", *RECIPES]


@pytest.mark.parametrize("words", [["hydra/launcher=basic"], ["run.resume=quickstart"]])
def test_a_sweep_is_of_new_runs_by_our_launcher(
    words: list[str], command_line: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_directory, "find", lambda run: Path(run.resume))
    monkeypatch.setattr(run_directory, "settings", lambda run_dir: plain(compose(["recipe=quickstart"])))
    swept = ["--multirun", "learner.lr=2e-5,5e-5", *([] if "run.resume=quickstart" in words else ["recipe=quickstart"])]
    assert command_line(lambda: entry(lambda config: pytest.fail("it ran")), *swept, *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


def test_arguments_of_wandbs_agent_are_settings(command_line: Any) -> None:
    """As its `${args}` gives them, as `${args_no_hyphens}` does, and Hydra's own flags as they are."""
    seen = []
    words = ["recipe=quickstart", "--learner.lr=1e-05", "algorithm.group_size=4", "--config-name=config"]
    assert command_line(lambda: entry(lambda config: seen.append(config)), *words) == 0
    assert [(one.learner.lr, one.algorithm.group_size) for one in seen] == [(1e-5, 4)]
