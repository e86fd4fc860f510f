"""Confidence, the threshold it is compared with, and what is learned of both."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception.calibration import (
    FEATURES,
    Calibrator,
    best_threshold,
    calibration_error,
    confidence,
    fit,
    most_confident,
)
from perception.config import LookConfig
from perception.types import Candidate, LookState, Trajectory
from tests import builders
from tests.builders import lost, measured, unparsed


def candidate(sure: float, iou: float | None, failed: bool = False, predicted: float = 0.5) -> Candidate:
    return builders.candidate(iou, sure, failed, features=(predicted, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))


def test_the_fit_recovers_the_model_that_made_the_labels() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(20_000, 2))
    truth = 1 / (1 + np.exp(-(0.5 + 2.0 * features[:, 0] - 1.0 * features[:, 1])))
    np.testing.assert_allclose(fit(features, truth), [0.5, 2.0, -1.0], atol=0.01)


def test_a_constant_truth_is_fitted_by_the_bias_alone() -> None:
    weights = fit(np.random.default_rng(0).normal(size=(500, 3)), np.full(500, 0.8))
    assert weights[0] == pytest.approx(np.log(0.8 / 0.2), abs=1e-3) and np.abs(weights[1:]).max() < 1e-3


@given(
    st.lists(
        st.tuples(st.integers(0, 1000).map(lambda n: n / 1000), st.floats(-1, 1), st.floats(0.1, 10)),
        min_size=1,
        max_size=40,
    )
)
@settings(max_examples=100)
def test_no_other_threshold_gains_more(rows: list[tuple[float, float, float]]) -> None:
    sure, gains, weights = np.array(rows).T
    cost = 0.05

    def total(threshold: float) -> float:
        return float((weights * (gains - cost))[sure < threshold].sum())

    found = total(best_threshold(sure, gains, weights, cost))
    assert found >= max(total(threshold) for threshold in (0.0, *sure, 1.0)) - 1e-9


def test_thresholds_worked_by_hand() -> None:
    sure = np.array([0.2, 0.4, 0.6, 0.8])
    one = np.ones(4)
    assert best_threshold(sure, np.array([0.3, 0.2, -0.1, -0.2]), one, 0.01) == pytest.approx(0.5)
    assert best_threshold(sure, np.array([0.3, 0.2, 0.1, 0.2]), one, 0.01) == 1.0
    assert best_threshold(sure, np.array([-0.3, 0.0, 0.005, 0.0]), one, 0.01) == 0.0
    # what was explored stands for ten like it: at 0.6 it turns the sum
    assert best_threshold(sure, np.array([0.3, -0.1, 0.05, -0.2]), np.array([1, 1, 10, 10]), 0.0) == pytest.approx(0.7)


def test_calibration_error_worked_by_hand() -> None:
    # bins [0.1, 0.2) and [0.9, 1.0]: |0.3 - 1.0| and |0.95 - 1.0| over 3 answers
    sure, truth = np.array([0.15, 0.15, 0.95]), np.array([0.0, 1.0, 1.0])
    assert calibration_error(sure, truth) == pytest.approx((0.7 + 0.05) / 3)
    assert calibration_error(np.zeros(0), np.zeros(0)) == 0


def test_before_anything_is_learned_sam2_is_believed() -> None:
    state = LookState(weights=(), threshold=1.0, explore=0.0)
    features = np.zeros((2, len(FEATURES)))
    features[:, 0] = [0.7, 1.4]
    assert confidence(state.weights, features).tolist() == [0.7, 1.0]


def test_the_most_confident_candidate_that_parses_is_kept() -> None:
    assert most_confident([candidate(0.4, None), candidate(0.6, None)]) == 1
    assert most_confident([candidate(0.6, None), candidate(0.4, None)]) == 0
    assert most_confident([candidate(0.1, None), candidate(0.9, None, failed=True)]) == 0
    assert most_confident([candidate(0.5, None), candidate(0.5, None)]) == 1


def _steps(rng: np.random.Generator, n: int) -> list[Trajectory]:
    """First answers are as good as SAM2 predicts; a second look always ends at 0.7."""
    return [measured(candidate(p, p, predicted=p), candidate(0.99, 0.7, predicted=0.7)) for p in rng.uniform(0, 1, n)]


def test_the_threshold_moves_to_where_a_second_look_stops_paying() -> None:
    calibrator = Calibrator(LookConfig(cost=0.05))
    assert not calibrator.fitted
    calibrator.learn(_steps(np.random.default_rng(0), 1000))
    sure = confidence(calibrator.state.weights, np.array([[0.65] + [0.0] * 6]))[0]  # gain 0.05 = cost
    assert calibrator.fitted and calibrator.state.threshold == pytest.approx(sure, abs=0.03)
    dear = Calibrator(LookConfig(cost=1.0))
    dear.learn(_steps(np.random.default_rng(0), 1000))
    assert dear.state.threshold == 0


def test_confident_answers_that_were_explored_stand_for_those_that_were_not() -> None:
    calibrator = Calibrator(LookConfig(explore=0.1, cost=0.0))
    calibrator.learn(_steps(np.random.default_rng(0), 200))
    threshold = calibrator.state.threshold
    below = measured(candidate(threshold - 0.01, 0.2), candidate(0.99, 0.3))
    above = measured(candidate(threshold + 0.01, 0.8), candidate(0.99, 0.9))
    calibrator.learn([below, above])
    assert calibrator.export().decisions[-2:, -1].tolist() == [1.0, pytest.approx(10.0)]
    assert calibrator.export().decisions[-2:, -2] == pytest.approx([0.1, 0.1])


def test_learning_is_deterministic_bounded_and_survives_a_checkpoint() -> None:
    first, second = Calibrator(LookConfig(window=300)), Calibrator(LookConfig(window=300))
    rng = np.random.default_rng(1)
    steps = [_steps(rng, 120) for _ in range(4)]
    for step in steps[:2]:
        first.learn(step)
    second.restore(first.export())
    for step in steps[2:]:
        first.learn(step)
        second.learn(step)
    assert first.state == second.state
    assert len(first.export().judged) == 300 and len(first.export().decisions) == 300


def test_the_window_keeps_the_newest_answers_and_decisions() -> None:
    """Where 100 answers were looked at again, the judged ones are 200 and the decisions 100; 30 of each are kept."""
    calibrator = Calibrator(LookConfig(window=30))
    steps = [measured(candidate(0.5, i / 1000), candidate(0.9, i / 1000 + 0.5)) for i in range(100)]
    calibrator.learn(steps[:60])
    calibrator.learn(steps[60:])
    kept = calibrator.export()
    expected = [iou for i in range(85, 100) for iou in (i / 1000, i / 1000 + 0.5)]
    assert kept.judged[:, -1] == pytest.approx(expected)
    assert len(kept.decisions) == 30 and kept.decisions[:, -2] == pytest.approx([0.5] * 30)
    # the gain of the newest decision alone
    calibrator.learn([measured(candidate(0.5, 0.2), candidate(0.9, 0.3))])
    assert calibrator.export().decisions[:, -2] == pytest.approx([0.5] * 29 + [0.1])


def test_a_checkpoint_of_other_features_is_refused() -> None:
    calibrator = Calibrator(LookConfig())
    saved = calibrator.export()
    other = type(saved)(look=saved.look, judged=np.zeros((0, 3)), decisions=np.zeros((0, 4)))
    with pytest.raises(ValueError, match="other features"):
        calibrator.restore(other)


def test_unjudged_answers_teach_nothing() -> None:
    calibrator = Calibrator(LookConfig())
    calibrator.learn([measured(candidate(0.5, None), candidate(0.6, None))] * 100)
    assert not calibrator.fitted and not len(calibrator.export().decisions)


def test_what_engine_or_reward_worker_failed_teaches_nothing() -> None:
    calibrator = Calibrator(LookConfig())
    calibrator.learn([lost()] * 100)
    assert not len(calibrator.export().judged)


def test_an_answer_that_did_not_parse_is_learned_as_an_overlap_of_nothing() -> None:
    calibrator = Calibrator(LookConfig())
    calibrator.learn([unparsed(candidate(0.5, 0.0, failed=True))] * 70)
    assert calibrator.export().judged[:, -1].tolist() == [0.0] * 70
