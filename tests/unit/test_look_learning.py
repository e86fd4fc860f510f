"""Before and beside training: whether a policy knows the second look, what is learned of it, and where that is kept."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.record.look_file import read_calibrator, read_look, write_calibrator
from launch.run.calibrate import calibrate
from launch.run.step_metrics import look_metrics
from perception import metric_catalog as catalog
from perception.calibration import Calibrator
from perception.config import LookConfig
from perception.errors import UserError
from perception.types import (
    Answer,
    Candidate,
    Failure,
    FailureKind,
    SamplingSpec,
    Score,
    ScoredGroup,
)

UNPARSED = Failure(kind=FailureKind.UNPARSED, detail="?")


def _looked(parsed: bool) -> Score:
    answers = [Answer(objects=()), Answer(objects=(), failure=None if parsed else UNPARSED)]
    features = (0.5, 0.5, 0.5, -0.1, 0.0, 0.0, 0.0)
    candidates = tuple(Candidate(answer=a, features=features, confidence=0.5, mask_iou=0.5) for a in answers)
    return Score(metrics={}, answer=answers[0], candidates=candidates)


@pytest.mark.parametrize("parsed", [True, False])
def test_a_policy_that_does_not_know_the_second_look_is_told_so(parsed: bool) -> None:
    async def answer(prompts: list[Any], sampling: SamplingSpec) -> list[ScoredGroup]:
        scores = (_looked(parsed),) * sampling.n
        return [ScoredGroup(group=prompt, scores=scores, seconds=0.0, cached=False) for prompt in prompts]

    settings = SimpleNamespace(
        look=LookConfig(),
        rollout=SimpleNamespace(temperature=1.0, max_new_tokens=64),
        model=SimpleNamespace(path="assets/other"),
    )
    samples: Any = ["a sample"] * 70
    system: Any = SimpleNamespace(
        config=settings, answer=answer, prompts=lambda samples, step: list(samples), look=Calibrator(LookConfig())
    )
    if parsed:
        assert "256 second looks" in asyncio.run(calibrate(system, samples))
        assert system.look.fitted
    else:
        with pytest.raises(UserError, match=r"only 0 of 256 second looks .* assets/other does not know this turn"):
            asyncio.run(calibrate(system, samples))


def test_what_was_learned_of_looking_is_saved_with_the_policy(tmp_path: Path) -> None:
    assert read_look(tmp_path) is None and read_calibrator(tmp_path) is None
    calibrator = Calibrator(LookConfig())
    calibrator.learn([_looked(True)] * 100)
    write_calibrator(tmp_path, calibrator.export())
    again = Calibrator(LookConfig())
    saved = read_calibrator(tmp_path)
    assert saved is not None and saved.look == calibrator.state == read_look(tmp_path)
    again.restore(saved)
    again.learn([_looked(True)] * 10)
    calibrator.learn([_looked(True)] * 10)
    assert again.state == calibrator.state


@pytest.mark.parametrize("text", ["{", "[]", '{"features": ["x"], "weights": []}', '{"features": [], "weights": [1]}'])
def test_a_damaged_look_file_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "look.json").write_text(text)
    with pytest.raises(UserError, match=r"look\.json: .*remove it"):
        read_look(tmp_path)


def test_a_steps_looks_in_figures() -> None:
    def one(*passes: tuple[float, float], kept: int) -> Score:
        candidates = tuple(
            Candidate(answer=Answer(objects=()), features=(0.0,) * 7, confidence=sure, mask_iou=iou)
            for sure, iou in passes
        )
        return Score(
            metrics={}, answer=candidates[kept].answer, confidence=passes[kept][0], candidates=candidates, kept=kept
        )

    scores = (
        one((0.95, 0.9), kept=0),
        one((0.25, 0.2), (0.75, 0.6), kept=1),
        one((0.55, 0.5), (0.15, 0.3), kept=0),
        Score(metrics={}, answer=Answer(objects=(), failure=UNPARSED)),
    )
    turns = [SimpleNamespace(prefix_tokens=100, prefix_cached=c) for c in (0, 64, 96)]
    trajectories = [
        SimpleNamespace(turns=turns[:1]),
        SimpleNamespace(turns=turns[:2]),
        SimpleNamespace(turns=turns[::2]),
    ]
    group: Any = SimpleNamespace(trajectories=trajectories)
    found = look_metrics([ScoredGroup(group=group, scores=scores, seconds=0.0, cached=False)])
    assert found[catalog.PREFIX_HITS] == pytest.approx(160 / 200)
    assert found[catalog.LOOK_PASSES] == pytest.approx(5 / 3)
    assert found[catalog.RELOOK_RATE] == pytest.approx(2 / 3)
    assert found[catalog.RELOOK_GAIN] == pytest.approx(0.2)  # 0.4 and nothing
    assert found[catalog.RELOOK_CHANGED] == pytest.approx(0.5)
    assert found[catalog.CONFIDENCE] == pytest.approx((0.95 + 0.75 + 0.55) / 3)
    # five bins of one answer each: 0.05, 0.05, 0.15, 0.05, 0.15
    assert found[catalog.CALIBRATION_ERROR] == pytest.approx((0.05 + 0.05 + 0.15 + 0.05 + 0.15) / 5)
