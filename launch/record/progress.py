"""Live progress: a panel on a terminal, one plain line per step anywhere else (CI logs, `ray job logs`)."""

import math
import time
from collections.abc import Mapping
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from perception import metric_catalog as catalog

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK_STEPS = 40
_RECENT_STEPS = 10
_STAGE_COLOURS = ("blue", "magenta", "green", "yellow", "bright_black")


class Progress:
    """Shows where a run is. `phase` names what happens outside the steps; `step` shows a step's metrics.

    The line of a step shows the metrics in `metric_catalog.PROGRESS`.
    """

    def __init__(self, total_steps: int, *, console: Console | None = None) -> None:
        self._console = console or Console()
        self._total = total_steps
        self._done = 0
        self._phase: str | None = None
        self._phase_start = time.monotonic()
        self._metrics: Mapping[str, float] = {}
        self._rewards: list[float] = []
        self._seconds: list[float] = []
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def phase(self, name: str) -> None:
        """Show what is going on now ('starting the engine'); the next `step` ends it."""
        self._phase, self._phase_start = name, time.monotonic()
        if not self._console.is_terminal:
            self.say(name)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a finished step, counted from 1."""
        self._phase = None
        self._done, self._metrics = step, metrics
        self._rewards.append(metrics.get(catalog.REWARD_MEAN, math.nan))
        self._seconds.append(metrics.get(catalog.SECONDS_STEP, 0.0))
        if not self._console.is_terminal:
            self.say(self._line())

    def say(self, text: str) -> None:
        """Print a lasting line above the live panel."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _line(self) -> str:
        stages = "  ".join(f"{catalog.LABELS[name]} {seconds:.2f}" for name, seconds in self._stages())
        return f"step {self._done}/{self._total}  {self._figures()}  [{stages}]  ETA {self._eta()}"

    def _figures(self) -> str:
        shown = ((name, form) for name, form in catalog.PROGRESS.items() if name in self._metrics)
        return "  ".join(form.format(self._metrics[name]) for name, form in shown)

    def _stages(self) -> list[tuple[str, float]]:
        return [(name, self._metrics[name]) for name in catalog.STAGES if name in self._metrics]

    def _eta(self) -> str:
        recent = self._seconds[-_RECENT_STEPS:]
        return _clock((self._total - self._done) * sum(recent) / len(recent)) if recent else "?"

    def _render(self) -> Group:
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"step {self._done}/{self._total}", style="bold"),
            ProgressBar(total=self._total, completed=self._done, width=30),
            Text(f"ETA {self._eta()}" if self._done else "", style="dim"),
        )
        lines: list[Table | Text] = [head]
        if self._phase is not None:
            lines.append(Text(f"{self._phase} … {time.monotonic() - self._phase_start:.0f} s", style="cyan"))
        if self._metrics:
            lines.append(Text(self._figures()))
            lines.append(Text.assemble("reward ", (_sparkline(self._rewards[-_SPARK_STEPS:]), "green")))
            lines.extend(self._stage_bar())
        return Group(*lines)

    def _stage_bar(self) -> tuple[Text, Text]:
        """The step's stages, side by side, as wide as they took long, and their key."""
        stages = self._stages()
        total = sum(seconds for _, seconds in stages) or 1.0
        bar, key = Text("stages "), Text("       ")
        for (name, seconds), colour in zip(stages, _STAGE_COLOURS, strict=False):
            bar.append("█" * round(30 * seconds / total), style=colour)
            key.append(f"{catalog.LABELS[name]} {seconds:.2f} s  ", style=colour)
        return bar, key


def _sparkline(values: list[float]) -> str:
    known = [value for value in values if math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] if math.isfinite(value) else " " for value in values)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
