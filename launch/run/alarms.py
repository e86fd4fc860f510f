"""Rules held against the metrics of every step: alarms for what looks like learning and is not, and `run.stop_if`.

reward/mean < 0.1 for 20       in each of the last 20 steps
failure/truncated > 0.9        in the last step
reward/mean flat for 50        within 0.001 for 50 steps
"""

import math
import re
from collections import deque
from collections.abc import Mapping, Sequence

from launch.run.command_line import unknown
from perception import metric_catalog as catalog
from perception.errors import UserError
from perception.types import FailureKind, Group

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RULE = re.compile(rf"(\S+) *(?:([<>]) *({_NUMBER})| flat)(?: for ([1-9]\d*))?")
_FLAT = 1e-3
_SHOWN = 300  # characters of an example

ALARMS = {
    f"{catalog.PARSE_OK} < 0.01": "no answer parses",
    f"{catalog.ZERO_VARIANCE} > 0.99": "the rewards of every group are all equal, so nothing is learned",
    f"{catalog.failure(FailureKind.TRUNCATED)} > 0.9": "nearly all answers end at rollout.max_new_tokens",
    f"{catalog.REWARD_MEAN} flat for 50": "the reward does not move",
}
"""Rule -> what it means. An alarm is raised when its rule begins to hold."""


class Rule:
    """A rule, and the steps that it needs to remember. Raises UserError for one that cannot be read."""

    def __init__(self, text: str) -> None:
        found = _RULE.fullmatch(text.strip())
        if found is None:
            raise UserError(f"run.stop_if={text}: write a rule as 'reward/mean < 0.1 for 20' (<, > or flat; steps)")
        self.metric, self._sign, limit, steps = found.groups()
        self._limit = float(limit or "nan")
        if self.metric not in catalog.LABELS and not self.metric.startswith(catalog.FAMILIES):
            raise UserError(f"run.stop_if={text}: {unknown(self.metric, list(catalog.LABELS))}")
        self.text, self.holds = text, False
        self._recent: deque[float] = deque(maxlen=int(steps or 1))

    def begins(self, metrics: Mapping[str, float]) -> bool:
        """Whether it holds after this step, and did not before."""
        held, recent = self.holds, self._recent
        recent.append(metrics.get(self.metric, math.nan))
        self.holds = len(recent) == recent.maxlen and all(map(self._fits, recent))
        return self.holds and not held

    def _fits(self, value: float) -> bool:
        if self._sign is None:
            return abs(value - self._recent[0]) < _FLAT
        return value < self._limit if self._sign == "<" else value > self._limit


def example(groups: Sequence[Group]) -> str:
    """One answer as it was written, one that failed where there is one, and how it failed."""
    answers = [(group.prompt.sample.id, one) for group in groups for one in group.trajectories]
    name, one = next((answer for answer in answers if answer[1].failure), answers[0])
    why = f" ({one.failure.kind}: {one.failure.detail})" if one.failure else ""
    return f"sample {name} answered {one.text[:_SHOWN]!r}{why}"
