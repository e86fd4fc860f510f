"""Look-to-Confirm, the multi-pass form: an answer of low confidence is looked at again, closer.

Pass 1 answers. The reward pool estimates the answer's confidence without the truth and, where that is below the learned
threshold, draws the closer view: the part of the image around the answer, enlarged, the provisional mask outlined. The
dialogue goes on with that view and a request to confirm or correct, up to `look.max_passes` passes. No sample waits for
another's first pass. (Dr. Seg's published form has one pass; it is `look=inline`.)
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from perception.types import Feed, Finding, Group, Prompt, Trajectory, Turn

Sample = Callable[[Prompt, int, tuple[Turn, ...], Feed | None], Awaitable[Trajectory]]
"""(prompt, index, turns so far, what to feed next) -> the trajectory with one more turn."""
Examine = Callable[[Group], Awaitable[Sequence[Finding]]]
"""Trajectories of one prompt -> one finding each."""
Show = Callable[[Prompt, Finding], Feed]
"""Turns a closer view into what the policy is fed next."""


async def look(prompt: Prompt, n: int, passes: int, sample: Sample, examine: Examine, show: Show) -> Group:
    """Sample the n trajectories of a prompt, each of at most `passes` turns."""
    examiner = _Examiner(prompt, examine)

    async def one(index: int) -> Trajectory:
        trajectory = await sample(prompt, index, (), None)
        while trajectory.failure is None and len(trajectory.turns) < passes:
            finding = await examiner.finding(trajectory)
            if finding.failure is not None:
                return replace(trajectory, failure=finding.failure)
            if finding.view is None:
                break
            trajectory = await sample(prompt, index, trajectory.turns, show(prompt, finding))
        return trajectory

    return Group(prompt=prompt, trajectories=tuple(await asyncio.gather(*(one(index) for index in range(n)))))


class _Examiner:
    """Calls `examine` for one group: answers that arrive while a call is under way go together with the next one."""

    def __init__(self, prompt: Prompt, examine: Examine) -> None:
        self._prompt, self._examine, self._under_way = prompt, examine, asyncio.Lock()
        self._waiting: list[Trajectory] = []
        self._found: dict[int, Finding] = {}

    async def finding(self, trajectory: Trajectory) -> Finding:
        self._waiting.append(trajectory)
        await asyncio.sleep(0)  # those that came with it go with it
        async with self._under_way:
            if trajectory.index not in self._found:
                asked = tuple(self._waiting)
                findings = await self._examine(Group(prompt=self._prompt, trajectories=asked))
                self._waiting = self._waiting[len(asked) :]
                self._found |= {one.index: found for one, found in zip(asked, findings, strict=True)}
            return self._found.pop(trajectory.index)
