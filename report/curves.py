"""Curves of a report: the catalogue's charts, and one for each held-out metric."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from perception import metric_catalog as catalog
from report.charts import Chart, Spec, chart

Record = Mapping[str, Any]
"""Metrics of one step or evaluation by name, and its `step`."""

_COLOURS = 6
"""Series one chart can tell apart."""


def curves(
    metrics: Sequence[Record], evaluations: Sequence[Record], components: Iterable[str], failures: Iterable[str]
) -> list[Chart]:
    """The charts of what was recorded. `components` of the reward; `failures`: the kinds that occurred."""
    drawn = [chart(spec, evaluations) for spec in _held_out(evaluations)]
    drawn += [chart(spec, metrics) for spec in _training(components, failures)]
    return [one for one in drawn if one is not None]


def _held_out(evaluations: Sequence[Record]) -> list[Spec]:
    """One chart per task and measure, its ways of answering and held-out sets together."""
    series: dict[str, dict[str, str]] = {}
    found = catalog.read_held_out({name: None for record in evaluations for name in record})
    tasks = {one.task for one in found}
    for one in found:
        if one.measure != catalog.SAMPLES:
            what = catalog.HELD_OUT_LABELS.get(one.measure, one.measure)
            title = f"Held-out {what}" + (f", {one.task}" if len(tasks) > 1 else "")
            label = f"{one.held_out}, {one.way}" if one.held_out else one.way
            series.setdefault(title, {})[one.name] = label
    return [spec for title, of_title in series.items() for spec in spread(title, "mean", of_title, marks=True)]


def _training(components: Iterable[str], failures: Iterable[str]) -> list[Spec]:
    series: dict[str, dict[str, str]] = {title: {} for title in catalog.CHARTS}
    for name, title in catalog.DRAWN.items():
        series[title][name] = catalog.LABELS[name]
    series[catalog.COMPONENTS] = {catalog.component(name): name for name in components}
    series[catalog.FAILURES] = {catalog.FAILURE_PREFIX + kind: kind for kind in failures}
    return [
        spec
        for one in catalog.CHARTS.values()
        for spec in spread(one.title, one.unit, series[one.title], smooth=one.smooth, stacked=one.stacked)
    ]


def spread(title: str, unit: str, series: Mapping[str, str], **look: bool) -> list[Spec]:
    """As many charts as `_COLOURS` ask for, so that their series can be told apart, and as evenly filled as can be: one
    alone would have no legend."""
    pairs, charts = list(series.items()), math.ceil(len(series) / _COLOURS)
    size = math.ceil(len(pairs) / max(1, charts))
    return [Spec(title, unit, dict(pairs[i * size : (i + 1) * size]), **look) for i in range(charts)]
