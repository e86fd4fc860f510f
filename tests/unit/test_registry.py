"""Guards what is looked up by name: nearest-name errors, arguments held against signatures, the user's own plugins, and
reward components with parameters and needs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from perception.config import RewardConfig, weights
from perception.errors import UserError
from perception.registry import PLUGINS, Registry, check_arguments, find_plugins, load_plugins
from perception.tasks import TASKS
from reward_workers.components import (
    COMPONENTS,
    held_out_terms,
    needed_truth,
    needs,
    reward_terms,
    terms,
)
from tests.builders import case, target

# ---------------------------------------------------------------- registries


def shapes() -> Registry[int]:
    made: Registry[int] = Registry("shape")
    for name, corners in (("square", 4), ("triangle", 3)):
        made.register(name)(corners)
    return made


def test_entries_stand_under_their_names_in_order() -> None:
    made = shapes()
    assert list(made) == ["square", "triangle"] and made["triangle"] == 3
    assert "square" in made and "circle" not in made


def test_an_unknown_name_is_told_the_nearest_one_and_all() -> None:
    with pytest.raises(UserError, match=r"no shape 'squre'; did you mean 'square'\? \(known: square, triangle\)"):
        shapes()["squre"]
    with pytest.raises(UserError, match="no shape 'squre'; there are none"):
        Registry("shape")["squre"]


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="two shapes are called 'square'; choose another name"):
        shapes().register("square")(5)


# ---------------------------------------------------------------- arguments


def measure(case: object, *, alpha: float, ratio: float = 0.5, way: Literal["iou", "dice"] = "iou", n: int = 1) -> None:
    """Stands for any component or reader."""


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"alpha": 1}, {"alpha": 1.0}),
        ({"alpha": "0.25", "n": 3}, {"alpha": 0.25, "n": 3}),
        ({"alpha": 0, "way": "dice"}, {"alpha": 0.0, "way": "dice"}),
    ],
)
def test_arguments_are_converted_to_their_types(given: dict[str, Any], taken: dict[str, Any]) -> None:
    found = check_arguments(measure, given, "here")
    assert found == taken and {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in taken.items()
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"alhpa": 1}, "here: unknown key 'alhpa'; did you mean 'alpha'? (known: alpha, ratio, way, n)"),
        ({"case": 1, "alpha": 1}, "here: unknown key 'case'"),  # given by us, not by the settings
        ({"alpha": "high"}, "here.alpha='high': Input should be a valid number"),
        ({"alpha": 1, "way": "area"}, "here.way='area': Input should be 'iou' or 'dice'"),
        ({"alpha": 1, "n": 1.5}, "here.n=1.5: Input should be a valid integer"),
        ({"ratio": 0.1}, "here: 'alpha' is missing; it has no default"),
    ],
)
def test_what_does_not_fit_a_signature_is_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        check_arguments(measure, given, "here")
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------- components with parameters and needs


def test_a_component_takes_a_weight_or_a_weight_and_parameters() -> None:
    chosen = {"box_iou": 0.7, "box_accuracy": {"weight": 0.3, "threshold": 0.9}}
    found = terms(chosen, "reward.components")
    assert list(found) == ["box_iou", "box_accuracy"]
    assert weights(chosen) == {"box_iou": 0.7, "box_accuracy": 0.3}
    # the answer covers 80 of 100 pixels: above the default threshold, below the given one
    eighty = case('<answer>[{"bbox_2d": [0, 0, 8, 10]}]</answer>', target([(0, 0, 10, 10)]))
    plain = terms({"box_accuracy": 1}, "")["box_accuracy"]
    assert (found["box_iou"](eighty), plain(eighty), found["box_accuracy"](eighty)) == (0.8, 1.0, 0.0)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"s_mesure": 1.0}, "reward.ranked: no component 's_mesure'; did you mean 's_measure'? (known: "),
        ({"s_measure": {"alpha": 0.5}}, "reward.ranked.s_measure: needs a weight, as s_measure: 1.0 or s_measure: {"),
        ({"s_measure": {"weight": "much"}}, "reward.ranked.s_measure: needs a weight"),
        ({"s_measure": None}, "reward.ranked.s_measure: needs a weight"),
        (
            {"s_measure": {"weight": 1, "alfa": 0.5}},
            "reward.ranked.s_measure: unknown key 'alfa'; did you mean 'alpha'? (known: alpha)",
        ),
        (
            {"s_measure": {"weight": 1, "alpha": "high"}},
            "reward.ranked.s_measure.alpha='high': Input should be a valid",
        ),
        ({"mask_dice": {"weight": 1, "alpha": 0.5}}, "reward.ranked.mask_dice: unknown key 'alpha'; there are none"),
    ],
)
def test_a_component_that_does_not_fit_is_one_line(chosen: Mapping[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        terms(chosen, "reward.ranked")
    assert "\n" not in str(raised.value)


def test_a_component_stands_in_one_part_of_the_reward() -> None:
    twice = RewardConfig(name="mine", components={"mask_iou": 1.0}, ranked={"parsed": 1.0, "mask_iou": 1.0})
    with pytest.raises(UserError, match=r"reward\.components and reward\.ranked both name mask_iou"):
        reward_terms(twice)


@pytest.mark.parametrize(
    ("parts", "needed"),
    [
        ({"components": {"parsed": 1.0, "think_format": 1.0}}, set()),
        ({"components": {"count_exact": 1.0}}, {"count"}),
        ({"components": {"parsed": 1.0}, "ranked": {"matched_iou": 1.0, "point_score": 1.0}}, {"boxes", "points"}),
        ({"components": {"s_measure": {"weight": 1.0, "alpha": 0.2}}}, {"masks"}),
        ({"components": {"parsed": 1.0}, "rank": "group"}, {"masks"}),
        (
            {"components": {"dr_seg_iou": 1.0}, "ranked": {"mask_dice": 1.0}, "rank": "ecdf"},
            {"boxes", "points", "masks"},
        ),
    ],
)
def test_a_reward_says_what_truth_it_needs(parts: dict[str, Any], needed: set[str]) -> None:
    assert needed_truth(RewardConfig(name="mine", **({"components": {}} | parts))) == needed


def test_a_held_out_metric_is_a_component_with_its_default_parameters() -> None:
    assert needs(held_out_terms(("mask_iou", "count_exact"))) == {"masks", "count"}
    with pytest.raises(UserError, match="no reward component 'giou'"):
        held_out_terms(("giou",))


# ---------------------------------------------------------------- plugins


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What plugins change is put back: the environment, the search path, imported modules, registered names."""
    monkeypatch.setenv(PLUGINS, "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules, entries = set(sys.modules), dict(COMPONENTS._entries)
    yield
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    COMPONENTS._entries.clear()
    COMPONENTS._entries.update(entries)


def component(name: str) -> str:
    """A module that registers a component of this name."""
    return (
        "from reward_workers.components import Case, component\n\n"
        f'@component(needs={{"count"}})\ndef {name}(case: Case, *, step: float = 0.25) -> float:\n    return step\n'
    )


def test_a_plugin_is_a_module_on_the_path(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "relook_by_name.py").write_text(component("by_name"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_plugins(["relook_by_name"]) == [tmp_path / "relook_by_name.py"]
    assert os.environ[PLUGINS] == "relook_by_name"
    (term,) = terms({"by_name": {"weight": 2.0, "step": 0.5}}, "reward.components").values()
    assert term(case("")) == 0.5 and term.needs == {"count"}
    with pytest.raises(UserError, match="unknown key 'stp'; did you mean 'step'"):
        terms({"by_name": {"weight": 2.0, "stp": 0.5}}, "reward.components")


def test_a_plugin_is_a_package_by_its_path(fresh: None, tmp_path: Path) -> None:
    package = tmp_path / "relook_package"
    package.mkdir()
    (package / "__init__.py").write_text("from relook_package import rewards\n")
    (package / "rewards.py").write_text(component("of_package"))
    assert find_plugins([str(package)]) == [package]
    assert os.environ[PLUGINS] == "relook_package" and "of_package" in COMPONENTS


def test_plugins_are_files_by_their_paths_and_several_at_once(fresh: None, tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / f"relook_file_{number}.py").write_text(component(f"of_file_{number}"))
    paths = [tmp_path / str(number) / f"relook_file_{number}.py" for number in (1, 2)]
    assert find_plugins([str(path) for path in paths]) == paths
    assert os.environ[PLUGINS] == "relook_file_1,relook_file_2"
    assert {"of_file_1", "of_file_2"} <= set(COMPONENTS)


def test_a_worker_process_imports_what_the_environment_names_when_it_first_looks(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a worker: nothing was imported there but by name."""
    (tmp_path / "relook_late.py").write_text(component("late"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(PLUGINS, "relook_late")
    assert "relook_late" not in sys.modules
    assert COMPONENTS["late"].needs == {"count"} and "relook_late" in sys.modules
    monkeypatch.setenv(PLUGINS, "relook_nowhere")
    with pytest.raises(UserError, match="plugin relook_nowhere: cannot be imported"):
        list(TASKS)
    monkeypatch.delenv(PLUGINS)
    load_plugins()


def test_another_module_of_the_plugins_name_is_a_clash(fresh: None, tmp_path: Path) -> None:
    """The standard library's, and a plugin of before."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "relook_clash.py").write_text("")
    (tmp_path / "json.py").write_text("")
    with pytest.raises(UserError, match=r"json\.py: another module is called 'json' \(.*/json\); rename yours"):
        find_plugins([str(tmp_path / "json.py")])
    find_plugins([str(tmp_path / "a" / "relook_clash.py")])
    said = rf"another module is called 'relook_clash' \({tmp_path}/a/relook_clash\.py\); rename yours"
    with pytest.raises(UserError, match=said):
        find_plugins([str(tmp_path / "b" / "relook_clash.py")])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import relook_no_such_module", "ModuleNotFoundError: No module named 'relook_no_such_module'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def (", "SyntaxError"),
        (component("mask_iou"), "ValueError: two reward components are called 'mask_iou'; choose another name"),
    ],
)
def test_a_plugin_that_raises_is_named_with_what_it_raised(fresh: None, tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "relook_broken.py"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        find_plugins([str(path)])
    assert str(raised.value).startswith(f"plugins={path}: cannot be imported (") and said in str(raised.value)


def test_a_plugin_that_is_nowhere_is_named(fresh: None) -> None:
    with pytest.raises(UserError, match=r"plugins=relook_nowhere: cannot be imported \(ModuleNotFoundError"):
        find_plugins(["relook_nowhere"])
