"""On a GPU that others share, a worker takes no more memory than its share; torch's CUDA functions are recorded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from learner import rank as learner_rank
from learner.rank import LearnerRank
from perception.config import Config
from reward_workers.pool import RewardPool
from reward_workers.segmenter import Segmenter
from reward_workers.worker import RewardWorker
from tests.builders import changed, config, policy_spec


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was called, in order."""
    made: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: made.append(share))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: made.append("emptied"))
    return made


def sharing(device: str, share: float) -> Config:
    return changed(config(), "placement", device=device, learner_gpus=share, reward_gpus=share)


def rank(monkeypatch: pytest.MonkeyPatch, calls: list[Any], settings: Config) -> LearnerRank:
    monkeypatch.setattr(learner_rank.os, "environ", {})
    made = LearnerRank(0, 1, policy_spec(), settings)
    step, stepper = SimpleNamespace(grad_norm=1.0, loss=1.0, lr=1.0), SimpleNamespace()
    stepper.update = lambda batches: (calls.append("step"), ([step], {}))[1]
    monkeypatch.setattr(made, "_stepper", stepper, raising=False)
    monkeypatch.setattr(made, "_metrics", lambda sums, seconds: {})
    return made


@pytest.mark.parametrize(
    ("device", "share", "at_start", "at_step"),
    [
        ("cuda", 0.5, [0.5, "joined"], ["step", "emptied"]),
        ("cuda", 1.0, ["joined"], ["step"]),
        ("cpu", 0.0, ["joined"], ["step"]),
    ],
)
def test_a_learner_keeps_to_its_share_and_gives_back_what_a_step_leaves(
    monkeypatch: pytest.MonkeyPatch,
    calls: list[Any],
    device: str,
    share: float,
    at_start: list[Any],
    at_step: list[Any],
) -> None:
    def join(*address: Any) -> None:
        calls.append("joined")
        raise InterruptedError  # the rest needs a process group

    made = rank(monkeypatch, calls, sharing(device, share))
    monkeypatch.setattr(made, "_join", join)
    with pytest.raises(InterruptedError):
        made.start("", 0)
    assert calls == at_start
    calls.clear()
    made.update([])
    assert calls == at_step


@pytest.mark.parametrize(
    ("device", "share", "expected"),
    [("cuda", 0.1, [0.1, "loaded"]), ("cuda", 1.0, ["loaded"]), ("cpu", 0.0, ["loaded"])],
)
def test_a_segmenter_is_loaded_within_its_share(
    monkeypatch: pytest.MonkeyPatch, calls: list[Any], device: str, share: float, expected: list[Any]
) -> None:
    monkeypatch.setattr(Segmenter, "load", lambda *_: calls.append("loaded"))
    settings = sharing(device, share)
    pool = RewardPool(settings.reward, settings.look, settings.model, settings.placement, seats=[])
    RewardWorker(*pool.actors._arguments(0))._segmenter()
    assert calls == expected
