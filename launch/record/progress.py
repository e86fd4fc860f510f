"""Live progress: a panel on a terminal, plain lines anywhere else (CI logs, `ray job logs`): one when something begins,
one per step, and one every half minute about what lasts so long."""

import math
import threading
import time
from collections.abc import Mapping
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from perception import metric_catalog as catalog
from perception.types import Work

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK_STEPS = _BAR = 40
_RECENT_STEPS = 10
_STAGE_COLOURS = ("blue", "magenta", "green", "yellow", "bright_black")


class Progress:
    """Shows where a program is. `phase` names what goes on and for how long; `step` shows a step's metrics.

    The line of a step shows the metrics in `metric_catalog.PROGRESS`.
    """

    def __init__(self, total_steps: int = 0, *, console: Console | None = None, remind_s: float = 30.0) -> None:
        """0 steps: there are only phases."""
        self._console, self._remind_s, self._left = console or Console(), remind_s, threading.Event()
        self._total, self._done = total_steps, 0
        self._phase: str | None = "checking settings and models"
        self._past: list[Work] = []
        self._phase_start = time.monotonic()
        self._steps: list[Mapping[str, float]] = []
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        else:
            threading.Thread(target=self._remind, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()
        self._live.stop()

    def phase(self, name: str, announce: bool = True) -> None:
        """Show what is going on now ('starting the engine'), until the next `phase` or `step`."""
        self._begin(name)
        if announce and not self._console.is_terminal:
            self.say(name)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a finished step, counted from 1."""
        self._begin(None)
        self._done = step
        self._steps.append(metrics)
        if not self._console.is_terminal:
            self.say(self._line())

    def say(self, text: str) -> None:
        """Print a lasting line above the live panel."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def worked(self) -> list[Work]:
        """The phases that ended since this was last asked."""
        past, self._past = self._past, []
        return past

    def _begin(self, name: str | None) -> None:
        now = time.monotonic()
        if self._phase is not None:
            self._past.append(("controller", self._phase, self._phase_start, now))
        self._phase, self._phase_start = name, now

    def _remind(self) -> None:
        while not self._left.wait(self._remind_s):
            if self._phase is not None and time.monotonic() - self._phase_start >= self._remind_s:
                self.say(self._going_on())

    def _going_on(self) -> str:
        return f"{self._phase} … {_clock(time.monotonic() - self._phase_start)}"

    def _line(self) -> str:
        stages = "  ".join(f"{catalog.LABELS[name]} {seconds:.2f}" for name, seconds in self._stages())
        return f"step {self._done}/{self._total}  {self._figures()}  [{stages}]  ETA {self._eta()}"

    def _figures(self) -> str:
        last = self._steps[-1]
        return "  ".join(form.format(last[name]) for name, form in catalog.PROGRESS.items() if name in last)

    def _stages(self) -> list[tuple[str, float]]:
        return [(name, self._steps[-1][name]) for name in catalog.STAGES if name in self._steps[-1]]

    def _eta(self) -> str:
        recent = [metrics.get(catalog.SECONDS_STEP, 0.0) for metrics in self._steps[-_RECENT_STEPS:]]
        return _clock((self._total - self._done) * sum(recent) / len(recent)) if recent else "?"

    def _render(self) -> Group:
        bar = f"{'━' * round(_BAR * self._done / (self._total or 1)):╌<{_BAR}}"
        lines = (
            [Text(f"step {self._done}/{self._total}  {bar}  ETA {self._eta()}", style="bold")] if self._total else []
        )
        if self._phase is not None:
            lines.append(Text(self._going_on(), style="cyan"))
        if self._steps:
            rewards = [metrics.get(catalog.REWARD_MEAN, math.nan) for metrics in self._steps[-_SPARK_STEPS:]]
            sparks = Text.assemble("reward ", (_sparkline(rewards), "green"))
            lines += [Text(self._figures()), sparks, self._stage_bar()]
        return Group(*lines)

    def _stage_bar(self) -> Text:
        """The step's stages, side by side, each with a bar as long as it took."""
        total = sum(seconds for _, seconds in self._stages()) or 1.0
        line = Text("stages ")
        for (name, seconds), colour in zip(self._stages(), _STAGE_COLOURS, strict=False):
            line.append(f"{catalog.LABELS[name]} {seconds:.2f} s {'█' * round(20 * seconds / total)}  ", style=colour)
        return line


def _sparkline(values: list[float]) -> str:
    known = [value for value in values if math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] if math.isfinite(value) else " " for value in values)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
