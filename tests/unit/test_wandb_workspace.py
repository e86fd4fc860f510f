"""Guards the W&B workspace: every metric that a run can write has one panel of its own, as the catalogue has it."""

from __future__ import annotations

import json
import re
from itertools import product

import numpy as np
import pytest

from docs.wandb_workspace import PICTURES, TABLES, Lines, sections, workspace
from launch.record.trackers import EVALUATED
from perception import metric_catalog as catalog
from perception.metric_catalog import HeldOut
from perception.tasks import TASKS
from perception.types import FailureKind
from tests.fake_run import LOOK, evaluation, metrics

PANELS = [(section, lines) for section, panels in sections().items() for lines in panels]
WRITTEN = {
    *catalog.LABELS,
    *metrics(3, 0.5, np.random.default_rng(0), LOOK),
    *(catalog.failure(kind) for kind in FailureKind),
    *(f"component/{name}" for name in ("mask_iou", "s_measure", "my_own")),
    *(EVALUATED + name for name in evaluation(0.5, LOOK) if "/samples/" not in name),
    *(
        EVALUATED + HeldOut(task, measure, way, held_out).name
        for task, way, held_out in product(("segment", "my_own"), (catalog.GREEDY, catalog.SAMPLED), ("", "shifted"))
        for measure in {name for task in TASKS for name in TASKS[task].metrics}
    ),
}


def holds(lines: Lines, name: str) -> bool:
    return bool(re.search(lines.pattern, name)) if lines.pattern else name in lines.metrics


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_every_metric_is_in_one_panel_of_its_groups_section(name: str) -> None:
    (found,) = [(section, lines) for section, lines in PANELS if holds(lines, name)]
    first = found[1].metrics[0] if found[1].metrics else name
    assert found[0] == ("held-out" if name.startswith(EVALUATED) else first.partition("/")[0])


def test_charts_are_the_reports() -> None:
    """Same title, unit and metrics; within a section in the report's order, and before what has no chart."""
    titles = list(catalog.CHARTS)
    for section, panels in sections().items():
        drawn = [lines.title for lines in panels if lines.title in titles]
        assert drawn == sorted(drawn, key=titles.index)
        assert not drawn or section != "held-out"
        assert [lines.title for lines in panels[: len(drawn)]] == drawn
    assert {lines.title for _, lines in PANELS} >= set(titles)
    (stages,) = [lines for _, lines in PANELS if lines.title == "Time of a step"]
    assert stages.stacked and stages.metrics == catalog.STAGES and stages.unit == "seconds"


def test_wandbs_own_definition_holds_all_of_it() -> None:
    made = workspace("team", "relook")._to_model().model_dump(by_alias=True)
    shown = made["spec"]["section"]["panelBankConfig"]["sections"]
    assert [one["name"] for one in shown] == ["held-out", "answers", *list(sections())[1:]]
    text = json.dumps(made)
    assert all(json.dumps(name) in text for _, lines in PANELS for name in (lines.metrics or [lines.pattern]))
    assert all(key in text for key in (*PICTURES, *TABLES))
