"""The theory behind ranking: which share of the policy gradient each component of a summed reward gets.

With advantages A = (r - mu) / sigma_mix of r = r_1 + r_2 + r_3 and the score function S of a parameter, the policy
gradient of that parameter is

    g = E[A S] = sigma_S / sigma_mix * sum_j rho_j sigma_j

sigma_S, sigma_j, sigma_mix: standard deviations of S, r_j and r; rho_j: correlation of r_j with S. The policies here
have three independent parameters, and component j answers to parameter j alone: entry j of the gradient is what
component j contributes. The scales of the components are 1 : 10 : 100. Every expected value comes from the formula.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import advantages
from perception.config import EcdfConfig
from reward_workers.ranking import RankStore

SCALES = np.array([1.0, 10.0, 100.0])
EQUAL = (1.0, 1.0, 1.0)


def gradient(rewards: np.ndarray, scores: np.ndarray, chances: np.ndarray | None = None) -> np.ndarray:
    """E[A S]: rewards (N,) and scores (N, 3), each of chance 1/N unless told -> (3,)."""
    chances = np.full(len(rewards), 1 / len(rewards)) if chances is None else chances
    centred = rewards - chances @ rewards
    return (chances * centred / np.sqrt(chances @ centred**2)) @ scores


def shares(g: np.ndarray) -> np.ndarray:
    return np.abs(g) / np.abs(g).sum()


def ranked(history: np.ndarray, values: np.ndarray, **options: object) -> np.ndarray:
    """The summed ranks (N,) of values (N, 3) after a step of history (M, 3)."""
    config = EcdfConfig(**{"capacity": len(history), **options})  # type: ignore[arg-type]
    store = RankStore(("a", "b", "c"), config)
    store.append("segment", history)
    store.flush()
    return store.aggregate(store.rank("segment", values), EQUAL)


@pytest.mark.parametrize("chances", [(0.5, 0.5, 0.5), (0.3, 0.5, 0.8)])
def test_three_bits_exactly(chances: tuple[float, ...]) -> None:
    """Policy: three Bernoulli logits. All eight outcomes are enumerated, and the history holds each as often as it
    is likely. S_j = b_j - p_j; the middle ranks of a bit lie 1/2 apart whatever its p."""
    p = np.array(chances)
    bits = np.array(list(product((0.0, 1.0), repeat=3)))
    likely = np.where(bits, p, 1 - p).prod(axis=1)
    history = np.repeat(bits, np.round(likely * 1000).astype(int), axis=0)
    assert len(history) == 1000
    sigma_s = np.sqrt(p * (1 - p))

    raw = gradient(bits @ SCALES, bits - p, likely)
    sigma = SCALES * sigma_s
    assert raw == pytest.approx(sigma_s / np.sqrt((sigma**2).sum()) * sigma, rel=1e-9)

    after = gradient(ranked(history * SCALES, bits * SCALES), bits - p, likely)
    sigma = 0.5 * sigma_s
    assert after == pytest.approx(sigma_s / np.sqrt((sigma**2).sum()) * sigma, rel=1e-9)


def test_the_largest_scale_takes_nine_tenths_before_and_a_third_after() -> None:
    """The headline, exactly, with the published tie rule too: 0.9 %, 9 %, 90 % become a third each."""
    bits = np.array(list(product((0.0, 1.0), repeat=3)))
    assert shares(gradient(bits @ SCALES, bits - 0.5)) == pytest.approx([1 / 111, 10 / 111, 100 / 111], rel=1e-9)
    for ties in ("mid", "le"):
        after = gradient(ranked(bits * SCALES, bits * SCALES, ties=ties), bits - 0.5)
        assert shares(after) == pytest.approx([1 / 3] * 3, rel=1e-9)


def test_only_the_scale_is_equalised_not_what_a_component_tells() -> None:
    """Gaussian policy of unit width; component j is noisy, of correlation rho_j with its parameter's score.

    Raw: sigma_j = SCALES_j. Ranked: a uniform quantile U = Phi(r_j / sigma_j) has sigma 1/sqrt(12) and correlation
    rho_j sqrt(3 / pi) with S, as E[Phi(z) z] = 1 / (2 sqrt(pi)).
    """
    rng, rho, count = np.random.default_rng(0), np.array([0.9, 0.6, 0.3]), 200_000
    scores, noise = rng.standard_normal((2, 2 * count, 3))
    values = SCALES * (rho * scores + np.sqrt(1 - rho**2) * noise)
    history, values, scores = values[:count], values[count:], scores[count:]

    raw = gradient(values.sum(axis=1), scores)
    assert raw == pytest.approx(rho * SCALES / np.sqrt((SCALES**2).sum()), abs=0.01)
    assert shares(raw) == pytest.approx(rho * SCALES / (rho * SCALES).sum(), abs=0.01)

    after = gradient(ranked(history, values), scores)
    assert after == pytest.approx(rho * np.sqrt(3 / np.pi) / np.sqrt(3), abs=0.01)
    assert shares(after) == pytest.approx(rho / rho.sum(), abs=0.01)


def test_the_same_in_groups_of_eight_against_the_published_queue() -> None:
    """As training does it: the learner's own advantages of eight samples, 2048 rows of history."""
    rng = np.random.default_rng(1)
    scores = rng.standard_normal((5_000, 8, 3))
    values = SCALES * scores
    history = SCALES * rng.standard_normal((2048, 3))

    def of(rewards: np.ndarray) -> np.ndarray:
        scaled = np.array([advantages(one) for one in rewards.reshape(-1, 8)])
        return shares(np.einsum("gi,gij->j", scaled, scores))

    assert of(values.sum(axis=2)) == pytest.approx(SCALES / SCALES.sum(), abs=0.01)
    for options in ({}, {"ties": "le", "digits": 1}):
        assert of(ranked(history, values.reshape(-1, 3), **options)) == pytest.approx([1 / 3] * 3, abs=0.01)


@given(st.integers(0, 1000), st.tuples(*[st.integers(-20, 20)] * 3))
def test_no_rescaling_of_a_component_changes_any_rank(seed: int, powers: tuple[int, ...]) -> None:
    """Powers of two, which float32 multiplies without rounding: the rewards are the same to the last bit."""
    rng = np.random.default_rng(seed)
    history, values = np.round(rng.random((50, 3)), 1), np.round(rng.random((20, 3)), 1)
    factors = 2.0 ** np.array(powers)
    assert ranked(history * factors, values * factors).tolist() == ranked(history, values).tolist()
