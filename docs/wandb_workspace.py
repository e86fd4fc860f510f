"""Makes a W&B workspace of a project's runs: what the report draws, in its order, then every other metric.

python docs/wandb_workspace.py ENTITY PROJECT
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.record.trackers import EVALUATED
from launch.record.trackers.wandb import logged_in
from launch.run.command_line import told
from perception import metric_catalog as catalog
from perception.errors import UserError

PICTURES = ("rollouts/eval_pictures", "rollouts/train_pictures")
TABLES = ("rollouts/eval_answers", "rollouts/train_answers")
SMOOTHING = 0.6


class Lines(NamedTuple):
    """A panel of curves over steps."""

    title: str
    metrics: tuple[str, ...] = ()
    pattern: str = ""
    """Instead of metrics: a regular expression for names that end in what a run has."""
    unit: str = ""
    smooth: bool = False
    stacked: bool = False


def sections() -> dict[str, list[Lines]]:
    """Held-out measures first, then the catalogue's charts by the group of their first metric, then what has none."""
    measures = {**catalog.HELD_OUT_LABELS, catalog.PARSED: "answers that parse"}
    found = {"held-out": [Lines(label, pattern=rf"^{EVALUATED}[^/]+/{name}/") for name, label in measures.items()]}
    others = (Lines(label, (name,)) for name, label in catalog.LABELS.items() if name not in catalog.DRAWN)
    for lines in (*_charts(), *others):
        group = (lines.metrics[0] if lines.metrics else lines.pattern.strip("^")).partition("/")[0]
        found.setdefault(group, []).append(lines)
    return found


def _charts() -> Iterator[Lines]:
    patterns = {catalog.COMPONENTS: catalog.COMPONENT_PREFIX, catalog.FAILURES: catalog.FAILURE_PREFIX}
    for title, one in catalog.CHARTS.items():
        metrics = tuple(name for name, chart in catalog.DRAWN.items() if chart == title)
        pattern = f"^{patterns[title]}" if title in patterns else ""
        yield Lines(title, metrics, pattern, one.unit, one.smooth, one.stacked)


def workspace(entity: str, project: str) -> Any:
    """The `wandb_workspaces.workspaces.Workspace`, not saved yet."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as ws

    def plot(one: Lines) -> Any:
        return panels.LinePlot(
            title=one.title,
            y=list(one.metrics),
            metric_regex=one.pattern or None,
            title_y=one.unit or None,
            smoothing_type="exponential" if one.smooth else None,
            smoothing_factor=SMOOTHING if one.smooth else None,
            plot_type="stacked-area" if one.stacked else None,
        )

    answers = [panels.MediaBrowser(media_keys=[key], title=key.partition("/")[2]) for key in PICTURES]
    answers += [panels.WeavePanelSummaryTable(table_name=key) for key in TABLES]
    made = [ws.Section(name=name, panels=list(map(plot, lines)), is_open=True) for name, lines in sections().items()]
    made.insert(1, ws.Section(name="answers", panels=answers, is_open=True))
    return ws.Workspace(entity=entity, project=project, name="Relook", sections=made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entity", help="user or team that the project belongs to")
    parser.add_argument("project", help="as wandb.project")
    given = parser.parse_args()
    with told():
        if not logged_in():
            raise UserError("nobody is logged in to W&B: run `wandb login`")
        print(workspace(given.entity, given.project).save().url)


if __name__ == "__main__":
    main()
