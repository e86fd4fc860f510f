"""Guards the names of a sweep's combinations and the page that compares runs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from hydra_plugins.relook_launcher.names import combination_name
from launch.record import run_directory
from launch.record.summary import half_interval
from perception import metric_catalog as catalog
from perception.errors import UserError
from report import write_report
from report.curves import spread
from report.sweep import Combination, read_runs, read_sweep, save_sweep, write_comparison

GIOU, HALF = "segment/mask_iou/greedy", "segment/mask_iou/interval"


@pytest.mark.parametrize(
    ("swept", "name"),
    [
        ({"learner.lr": "2e-05"}, "lr-2e-05"),
        ({"learner.lr": "2e-05", "run.seed": "1"}, "lr-2e-05_seed-1"),
        ({"learner.lr": "7.288892469850438e-05"}, "lr-7.289e-05"),
        ({"reward": "dr_seg", "algorithm.group_size": "8"}, "reward-dr_seg_group_size-8"),
        ({"data.options.split": "a", "data.eval_options.split": "b"}, "options.split-a_eval_options.split-b"),
        ({"model.path": "'/models/a b/c,d'"}, "path-models-a-b-c-d"),
        ({"run.stop_if": "[reward/mean < 0.1 for 20]"}, "stop_if-reward-mean-0.1-for-20"),
        ({"+data.options.n": "-1"}, "n--1"),
        ({}, "combination"),
    ],
)
def test_a_combination_is_named_after_what_is_swept(swept: dict[str, str], name: str) -> None:
    assert combination_name(swept, ()) == name


VALUES = st.text(max_size=120) | st.sampled_from(
    ["a,b", "x/y", "[1, 2]", "{a:1}", "null", "1e-5", "ü", "a=b", "$(ls)", ""]
)
KEYS = st.lists(
    st.sampled_from(["learner.lr", "reward.lr", "run.seed", "look", "+a.b", "db@c.d", "data.also.ü"]), unique=True
)


@given(KEYS, st.lists(st.lists(VALUES, min_size=7, max_size=7), min_size=1, max_size=6))
def test_names_are_short_and_unique_and_a_command_line_takes_them(
    keys: list[str], combinations: list[list[str]]
) -> None:
    names: list[str] = []
    for values in combinations:
        names.append(combination_name(dict(zip(keys, values, strict=False)), names))
    assert len(set(names)) == len(names)
    for name in names:
        assert len(name) <= 64 and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name), name
        (parsed,) = OverridesParser.create().parse_overrides([f"run.resume={name}"])
        assert str(parsed.value()) == name and not parsed.is_sweep_override()


# ---------------------------------------------------------------- the page


def write_run(folder: Path, lr: float, seed: int, gious: list[float | None], half: float = 0.03) -> Path:
    """A run of as many steps as there are evaluations behind the first."""
    folder.mkdir(parents=True)
    settings = {"learner": {"lr": lr, "warmup": 0}, "run": {"name": folder.name, "seed": seed}}
    (folder / run_directory.CONFIG).write_text(yaml.safe_dump(settings))
    records = [
        {"step": step, GIOU: value, HALF: half, "segment/samples/sampled": 9} for step, value in enumerate(gious)
    ]
    (folder / run_directory.EVALUATIONS).write_text("".join(json.dumps(one) + "\n" for one in records))
    steps = [{"step": step, catalog.REWARD_MEAN: 0.5 + step / 10} for step in range(1, len(gious))]
    (folder / run_directory.METRICS).write_text("".join(json.dumps(one) + "\n" for one in steps))
    return folder


def rows(page: str) -> list[list[str]]:
    """Every table's rows as the texts of their cells."""
    cells = (re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S) for row in re.findall(r"<tr.*?</tr>", page, re.S))
    return [[" ".join(re.sub(r"<[^>]+>", "", cell).split()) for cell in row] for row in cells]


def test_the_page_has_values_intervals_failures_and_curves(tmp_path: Path) -> None:
    sweep = tmp_path / "quickstart-sweep"
    low = write_run(sweep / "lr-1_seed-1", 1.0, 1, [0.4, 0.7, 0.6])
    high = write_run(sweep / "lr-1_seed-2", 1.0, 2, [0.4, None, 0.8], half=0.05)
    other = write_run(sweep / "lr-2_seed-1", 2.0, 1, [0.4, 0.45, 0.5])
    why = "exit status 2: error: <script>alert(1)</script>"
    combinations = [
        Combination(low, {"learner.lr": "1", "run.seed": "1"}, ""),
        Combination(high, {"learner.lr": "1", "run.seed": "2"}, ""),
        Combination(other, {"learner.lr": "2", "run.seed": "1"}, ""),
        Combination(sweep / "lr-9_seed-1", {"learner.lr": "9", "run.seed": "1"}, why),
        Combination(sweep / "lr-9_seed-2", {"learner.lr": "9", "run.seed": "2"}),
    ]
    assert save_sweep(sweep, combinations) == sweep / run_directory.REPORT
    assert read_sweep(sweep) == combinations
    page = (sweep / run_directory.REPORT).read_text()
    table = rows(page)
    assert table[:6] == [
        ["", "learner.lr", "run.seed", "segment: gIoU, greedy answers, first", "last", "±", "change", "best"],
        ["lr-1_seed-2", "1", "2", "0.400", "0.800", "0.050", "+0.400", "0.800"],
        ["lr-1_seed-1", "1", "1", "0.400", "0.600", "0.030", "+0.200", "0.700"],
        ["lr-2_seed-1", "2", "1", "0.400", "0.500", "0.030", "+0.100", "0.500"],
        ["lr-9_seed-2 running", "9", "2", "", "", "", "", ""],
        ["Setting", "seeds", "mean", "±"],
    ]
    assert table[6] == ["learner.lr=1", "2", "0.700", f"{12.7062 * 0.1:.3f}"]  # t(0.975; 1), standard error 0.1
    assert table[8] == ["lr-9_seed-1", "9", "1", "exit status 2: error: &lt;script&gt;alert(1)&lt;/script&gt;"]
    assert page.count('<figure class="card chart"') == 2  # held-out gIoU and reward
    assert all(page.count(f"</i>{name}</span>") == 2 for name in ("lr-1_seed-2", "lr-1_seed-1", "lr-2_seed-1"))
    assert 'href="lr-1_seed-1/report.html"' in page
    before = page
    assert write_report(sweep).read_text() == before


def test_runs_are_compared_by_the_settings_in_which_they_differ(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, lr, 7, [0.1, lr]) for name, lr in (("a", 0.2), ("b", 0.3))]
    found = read_runs(runs)
    assert [one.swept for one in found] == [{"learner.lr": 0.2}, {"learner.lr": 0.3}]
    page = write_comparison(found, tmp_path / "comparison.html").read_text()
    assert [row[:2] for row in rows(page)] == [["", "learner.lr"], ["b", "0.3"], ["a", "0.2"]]
    with pytest.raises(UserError, match=r"config\.yaml"):
        read_runs([*runs, tmp_path / "nothing"])


def test_a_chart_has_six_runs_at_most(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / f"r{i}", i / 10, 7, [0.1, i / 10]) for i in range(8)])
    page = write_comparison(runs, tmp_path / "comparison.html").read_text()
    assert page.count("<h3>Reward</h3>") == 2


@pytest.mark.parametrize(("values", "half"), [([1.0, 3.0], 12.7062), ([2.0, 2.0, 2.0], 0.0), ([0.0, 1.0, 2.0], 2.4841)])
def test_half_a_t_interval(values: list[float], half: float) -> None:
    assert half_interval(values) == pytest.approx(half, abs=1e-4)


def test_the_value_of_a_run_without_an_evaluation(tmp_path: Path) -> None:
    assert Combination(tmp_path, {}).value() == -math.inf


def test_an_interval_is_no_metric() -> None:
    names: Any = [GIOU, HALF, f"{HALF}@shifted"]
    assert [one.name for one in catalog.read_held_out(names)] == [GIOU]


@pytest.mark.parametrize(("runs", "charts"), [(0, []), (1, [1]), (6, [6]), (7, [4, 3]), (13, [5, 5, 3])])
def test_many_curves_fill_their_charts_evenly(runs: int, charts: list[int]) -> None:
    """A seventh one alone would stand in a chart without a legend."""
    made = spread("Reward", "mean", {f"run{i}": f"run{i}" for i in range(runs)})
    assert [len(one.series) for one in made] == charts
    assert [name for one in made for name in one.series] == [f"run{i}" for i in range(runs)]
