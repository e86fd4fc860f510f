"""Charts as geometry: the numbers, paths and labels that the template draws as inline SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 420, 200
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 26
MAX_POINTS = 300
"""A longer curve is shown by the means of so many equal stretches."""
_TICKS = 4
_NOTHING = 1e-300


@dataclass(frozen=True, slots=True)
class Spec:
    """Definition of a chart: its metrics and their labels."""

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
    dots: list[list[float]]
    values: list[float | None]
    """One entry per step; None is a gap."""


@dataclass(frozen=True, slots=True)
class Chart:
    spec: Spec
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[Series, ...]
    steps: list[float]
    xs: list[float]
    """x of each step in SVG units, for the readout under the pointer."""


def chart(spec: Spec, records: Sequence[Mapping[str, float | None]]) -> Chart | None:
    """Lay out `spec` over records that each hold 'step'; None where no record has any of its metrics."""
    names = [name for name in spec.series if any(record.get(name) is not None for record in records)]
    if not names:
        return None
    stride = math.ceil(len(records) / MAX_POINTS)
    steps = np.array([record["step"] for record in records[::stride]], float)
    columns = _thinned(np.array([[record.get(name) for record in records] for name in names], float), stride)
    lines = _running_mean(columns) if spec.smooth else columns
    if spec.stacked:
        lines = np.nancumsum(lines, 0)
    known = np.concatenate([lines, columns])
    y_values = _ticks(0.0 if spec.stacked else float(np.nanmin(known)), float(np.nanmax(known)))
    low, high = y_values[0], y_values[-1]
    first, last = float(steps[0]), float(max(steps[-1], steps[0] + 1))
    across, upwards = ((first, last), (LEFT, WIDTH - RIGHT)), ((low, high), (HEIGHT - BOTTOM, TOP))
    xs = np.interp(steps, *across)

    def placed(values: np.ndarray) -> np.ndarray:
        return np.stack([xs, np.interp(values, *upwards)], 1)

    series, floor = [], np.zeros_like(steps)
    for name, line, column in zip(names, lines, columns, strict=True):
        points = placed(line)
        series.append(
            Series(
                label=spec.series[name],
                path=_area(points, placed(floor)) if spec.stacked else _line(points),
                raw_path=_line(placed(column)) if spec.smooth else "",
                dots=points[~np.isnan(line)].tolist() if spec.marks else [],
                values=[None if math.isnan(value) else value for value in column.tolist()],
            )
        )
        floor = line
    whole = [step for step in _ticks(first, last) if first <= step <= last and step == int(step)]
    return Chart(
        spec=spec,
        x_ticks=tuple(map(Tick, np.interp(whole, *across).tolist(), (f"{step:,.0f}" for step in whole))),
        y_ticks=tuple(map(Tick, np.interp(y_values, *upwards).tolist(), _labels(y_values))),
        series=tuple(series),
        steps=steps.tolist(),
        xs=[round(x, 1) for x in xs.tolist()],
    )


def _mean(windows: np.ndarray) -> np.ndarray:
    """Mean of the known values along the last axis, NaN where there is none."""
    return np.ma.masked_invalid(windows).mean(-1).filled(np.nan)


def _thinned(columns: np.ndarray, stride: int) -> np.ndarray:
    """Means of every `stride` steps: (M, N) -> (M, N / stride), rounded up."""
    padded = np.pad(columns, ((0, 0), (0, -columns.shape[1] % stride)), constant_values=np.nan)
    return _mean(padded.reshape(len(columns), -1, stride))


def _running_mean(columns: np.ndarray) -> np.ndarray:
    """(M, N), along N: centred, over about a tenth of the curve; one-sided at the ends."""
    reach = max(1, columns.shape[1] // 20)
    padded = np.pad(columns, ((0, 0), (reach, reach)), constant_values=np.nan)
    return _mean(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=1))


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


def _line(points: np.ndarray) -> str:
    """SVG path through points (N, 2), with a gap wherever one is NaN."""
    runs = np.ma.clump_unmasked(np.ma.masked_invalid(points[:, 1]))
    return "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points[run].tolist()) for run in runs)


def _area(tops: np.ndarray, floors: np.ndarray) -> str:
    return f"{_line(tops)}L{_line(floors[::-1])[1:]}Z"
