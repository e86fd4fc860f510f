"""Failures of an engine as values: marked trajectories and groups."""

from perception.types import Failure, FailureKind, Group, Prompt, Trajectory, Turn


def failed_group(prompt: Prompt, n: int, detail: str) -> Group:
    """A group of n trajectories that failed as `detail` says."""
    return Group(prompt=prompt, trajectories=tuple(failed_trajectory(prompt, index, detail) for index in range(n)))


def failed_trajectory(prompt: Prompt, index: int, detail: str) -> Trajectory:
    failure = Failure(kind=FailureKind.ENGINE, detail=f"sample {prompt.sample.id}: {detail}")
    return Trajectory(index=index, turns=(), failure=failure)


def failure_of(turn: Turn) -> Failure | None:
    """What went wrong with a turn that vLLM gave back; None where nothing did."""
    if turn.finish_reason not in ("stop", "length"):
        return Failure(kind=FailureKind.ENGINE, detail=f"vLLM ended the sample with {turn.finish_reason!r}")
    if not turn.token_ids:
        return Failure(kind=FailureKind.EMPTY, detail="vLLM returned no token")
    if turn.finish_reason == "length":
        return Failure(kind=FailureKind.TRUNCATED, detail=f"no end of answer within {len(turn.token_ids)} tokens")
    return None
