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
from perception.config import LookConfig, ModelConfig
from perception.errors import UserError
from perception.types import Group, Prompt, SamplingSpec, Trajectory
from tests.builders import candidate, config, group, lost, measured, prompt, sample, trajectory, turn

FEATURES = (0.5, 0.5, 0.5, -0.1, 0.0, 0.0, 0.0)


def _looked(parsed: bool) -> Trajectory:
    first = candidate(0.5, features=FEATURES)
    return measured(first, candidate(0.5, features=FEATURES, failed=not parsed))


@pytest.mark.parametrize("parsed", [True, False])
def test_a_policy_that_does_not_know_the_second_look_is_told_so(parsed: bool) -> None:
    async def answer(prompts: list[Prompt], sampling: SamplingSpec) -> list[Group]:
        return [group(*[_looked(parsed)] * sampling.n, about=one) for one in prompts]

    settings = config(model=ModelConfig(path="assets/other", segmenter=""))
    samples = [sample(str(i)) for i in range(70)]
    system: Any = SimpleNamespace(
        config=settings,
        answer=answer,
        prompts=lambda samples, step: [prompt(one) for one in samples],
        calibrator=Calibrator(settings.look),
    )
    if parsed:
        assert "256 second looks" in asyncio.run(calibrate(system, samples))
        assert system.calibrator.fitted
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
    def one(*passes: tuple[float, float], cached: tuple[int, ...] = ()) -> Trajectory:
        """Passes of (confidence, mask IoU); of a later one's prefix of 100 tokens so many were cached."""
        scored = measured(*(candidate(iou, sure) for sure, iou in passes))
        later = [turn(prefix_tokens=100, prefix_cached=tokens) for tokens in cached]
        return trajectory(turn(), *later, score=scored.score)

    about = group(
        one((0.95, 0.9)),
        one((0.25, 0.2), (0.75, 0.6), cached=(64,)),
        one((0.55, 0.5), (0.15, 0.3), cached=(96,)),
        lost(),
    )
    found = look_metrics([about])
    assert found[catalog.PREFIX_HITS] == pytest.approx(160 / 200)
    assert found[catalog.LOOK_PASSES] == pytest.approx(5 / 3)
    assert found[catalog.RELOOK_RATE] == pytest.approx(2 / 3)
    assert found[catalog.RELOOK_GAIN] == pytest.approx(0.2)  # 0.4 and nothing
    assert found[catalog.RELOOK_CHANGED] == pytest.approx(0.5)
    assert found[catalog.CONFIDENCE] == pytest.approx((0.95 + 0.75 + 0.55) / 3)
    # five bins of one answer each: 0.05, 0.05, 0.15, 0.05, 0.15
    assert found[catalog.CALIBRATION_ERROR] == pytest.approx((0.05 + 0.05 + 0.15 + 0.05 + 0.15) / 5)
