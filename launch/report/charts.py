"""Curves as geometry: what the template draws as inline SVG. No pixels, no library, nothing but numbers and labels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 420, 200
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 26
MAX_POINTS = 300
"""A longer curve is shown by the means of so many equal stretches."""
_TICKS = 4
_NOTHING = 1e-300

Values = list[float | None]
"""One entry per step; None is a gap."""


@dataclass(frozen=True, slots=True)
class Spec:
    """A chart to be: which metrics, under which labels."""

    title: str
    unit: str
    series: Mapping[str, str]
    """Metric name -> label."""
    stacked: bool = False
    smooth: bool = False
    """A single noisy series: draw its running mean boldly and the raw curve faintly."""
    marks: bool = False
    """A dot per value: for few, separate measurements."""


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Series:
    label: str
    path: str
    """Line, or with `stacked` the outline of an area."""
    raw_path: str
    """The unsmoothed line behind `path`; empty without smoothing."""
    dots: tuple[tuple[float, float], ...]
    values: Values


@dataclass(frozen=True, slots=True)
class Chart:
    spec: Spec
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[Series, ...]
    steps: list[float]
    xs: list[float]
    """Where each step lies, in SVG units: what hovering looks up."""


def chart(spec: Spec, records: Sequence[Mapping[str, float | None]]) -> Chart | None:
    """Lay out `spec` over records that each hold 'step'; None where no record has any of its metrics."""
    present = {name: label for name, label in spec.series.items() if any(r.get(name) is not None for r in records)}
    if not present:
        return None
    steps = [float(record["step"] or 0) for record in records]
    columns = {name: [record.get(name) for record in records] for name in present}
    steps, columns = _thin(steps, columns)
    lines = [_running_mean(values) if spec.smooth else values for values in columns.values()]
    if spec.stacked:
        lines = _cumulative(lines)
    known = [value for line in (*lines, *columns.values()) for value in line if value is not None]
    y_values = _ticks(0.0 if spec.stacked else min(known), max(known))
    low, high = y_values[0], y_values[-1]
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    xs = [x(step) for step in steps]
    floors: Sequence[Values] = [[0.0] * len(steps), *lines[:-1]]
    series = []
    for (name, label), line, floor in zip(present.items(), lines, floors, strict=True):
        ys = [None if value is None else y(value) for value in line]
        raw = [None if value is None else y(value) for value in columns[name]]
        base = [None if value is None else y(value) for value in floor]
        series.append(
            Series(
                label=label,
                path=_area(xs, ys, base) if spec.stacked else _line(xs, ys),
                raw_path=_line(xs, raw) if spec.smooth else "",
                dots=tuple((px, py) for px, py in zip(xs, ys, strict=True) if py is not None) if spec.marks else (),
                values=columns[name],
            )
        )
    return Chart(
        spec=spec,
        x_ticks=tuple(Tick(x(v), f"{v:,.0f}") for v in _ticks(first, last) if first <= v <= last and v == int(v)),
        y_ticks=tuple(Tick(y(v), label) for v, label in zip(y_values, _labels(y_values), strict=True)),
        series=tuple(series),
        steps=steps,
        xs=[round(px, 1) for px in xs],
    )


def _thin(steps: list[float], columns: dict[str, Values]) -> tuple[list[float], dict[str, Values]]:
    stride = math.ceil(len(steps) / MAX_POINTS)
    if stride == 1:
        return steps, columns
    starts = range(0, len(steps), stride)
    return steps[::stride], {name: [_mean(v[s : s + stride]) for s in starts] for name, v in columns.items()}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _running_mean(values: Values) -> Values:
    """Centred, over about a tenth of the curve; one-sided at the ends."""
    reach = max(1, len(values) // 20)
    return [_mean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def _cumulative(lines: Sequence[Values]) -> list[Values]:
    total = [0.0] * len(lines[0])
    stacked: list[Values] = []
    for line in lines:
        total = [below + (value or 0.0) for below, value in zip(total, line, strict=True)]
        stacked.append(list(total))
    return stacked


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`."""
    if high - low <= max(1e-5 * max(abs(low), abs(high)), _NOTHING):  # rounding errors around one value are no curve
        margin = abs(high) * 0.1 if abs(high) > _NOTHING else 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(start, end + 1)]


def _labels(ticks: Sequence[float]) -> list[str]:
    """The shortest digits that still say where the ticks are; powers of ten for the very large and very small."""
    fixed = [f".{digits}f" for digits in range(6)] if max(map(abs, ticks)) < 1e6 else []
    allowed = (ticks[1] - ticks[0]) / 100
    for form in (*fixed, *(f".{digits}e" for digits in range(16))):
        labels = [format(tick, form) for tick in ticks]
        if all(abs(float(label) - tick) <= allowed for label, tick in zip(labels, ticks, strict=True)):
            break
    return [f"{tick:,{form}}".replace("e-0", "e-").replace("e+0", "e") for tick in ticks]


def _line(xs: Sequence[float], ys: Sequence[float | None]) -> str:
    """SVG path with a gap wherever a value is missing."""
    commands, pen_down = [], False
    for px, py in zip(xs, ys, strict=True):
        if py is not None:
            commands.append(f"{'L' if pen_down else 'M'}{px:.1f} {py:.1f}")
        pen_down = py is not None
    return "".join(commands)


def _area(xs: Sequence[float], tops: Sequence[float | None], floors: Sequence[float | None]) -> str:
    there = _line(xs, tops)
    back = _line(xs[::-1], floors[::-1])
    return f"{there}L{back[1:]}Z"
