"""Guards the objective: numbers worked out by hand, and sums that do not depend on how a step is cut."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.loss import K3_CAP, SURROGATES, TokenBatch, denominator, kl, policy_loss, token_sums
from perception import metric_catalog as catalog
from perception.config import AlgorithmConfig
from perception.errors import UserError

LOG2, LOG3 = math.log(2.0), math.log(3.0)


def config(**settings: Any) -> AlgorithmConfig:
    """The engine is the old policy unless a test says otherwise: ratios are then learner / engine."""
    clip = {"clip_low": 0.2, "clip_high": 0.3, "importance": "none"}
    return AlgorithmConfig(steps=1, prompts_per_step=1, group_size=2, **(clip | settings))


def batch(engine: list[float], advantages: list[float], sequence: list[int] | None = None) -> TokenBatch:
    return TokenBatch(
        rollout_logprobs=torch.tensor(engine),
        advantages=torch.tensor(advantages),
        loss_mask=torch.ones(len(engine)),
        sequence=torch.tensor(sequence or list(range(len(engine)))),
    )


def loss_and_gradient(logprobs: list[float], tokens: TokenBatch, algorithm: AlgorithmConfig, **others: Any) -> Any:
    current = torch.tensor(logprobs, requires_grad=True)
    loss = policy_loss(current, torch.zeros(len(logprobs)), replace(tokens, **others), algorithm)
    loss.backward()
    assert current.grad is not None
    return loss.item(), current.grad.tolist()


def test_ppo_by_hand() -> None:
    # Ratios 1, 2, 2, 1/2, 1/2 against the bounds 0.8 and 1.3.
    tokens = batch([-1.0, -1.0 - LOG2, -1.0 - LOG2, -1.0, -1.0], [3.0, 1.0, -1.0, 1.0, -1.0])
    loss, gradient = loss_and_gradient([-1.0, -1.0, -1.0, -1.0 - LOG2, -1.0 - LOG2], tokens, config())
    # min(rA, clip(r)A): 3; 1.3 (clipped); -2 (not clipped: worse is worse); 0.5; -0.8 (clipped)
    assert loss == pytest.approx(-(3.0 + 1.3 - 2.0 + 0.5 - 0.8), abs=1e-6)
    # d(rA) = rA where the clip does not act, else 0
    assert gradient == pytest.approx([-3.0, 0.0, 2.0, -0.5, 0.0], abs=1e-6)


def test_gspo_clips_the_trajectory_and_each_of_its_tokens_pulls_equally() -> None:
    # Token ratios 4, 1 | 4, 1 | 1/2: geometric means 2, 2, 1/2. Terms -min(sA, clip(s)A): -1.3 clipped, 2, 0.8 clipped.
    tokens = batch([-1.0 - 2 * LOG2, -1.0] * 2 + [-1.0], [1.0, 1.0, -1.0, -1.0, -1.0], [0, 0, 1, 1, 2])
    logprobs = [-1.0, -1.0, -1.0, -1.0, -1.0 - LOG2]
    loss, gradient = loss_and_gradient(logprobs, tokens, config(loss="gspo", aggregate="sequence"))
    assert loss == pytest.approx(-1.3 + 2.0 + 0.8, abs=1e-6)
    # d(-sA)/dlogp = -sA / T = 1 for both tokens of the second, though their own ratios are 4 and 1
    assert gradient == pytest.approx([0.0, 0.0, 1.0, 1.0, 0.0], abs=1e-6)
    loss, gradient = loss_and_gradient(logprobs, tokens, config(loss="gspo", aggregate="token"))
    assert loss == pytest.approx(2 * -1.3 + 2 * 2.0 + 0.8, abs=1e-6)
    assert gradient == pytest.approx([0.0, 0.0, 2.0, 2.0, 0.0], abs=1e-6)


def test_cispo_bounds_the_weight_and_drops_no_token() -> None:
    # Ratios 2, 2, 1/2. The loss is -clip(r) A log pi, its gradient -clip(r) A.
    tokens = batch([-1.0 - LOG2, -1.0 - LOG2, -1.0], [1.0, -1.0, 1.0])
    logprobs = [-1.0, -1.0, -1.0 - LOG2]
    loss, gradient = loss_and_gradient(logprobs, tokens, config(loss="cispo"))
    assert loss == pytest.approx(1.3 * 1.0 - 1.3 * 1.0 + 0.8 * (1.0 + LOG2), abs=1e-6)
    assert gradient == pytest.approx([-1.3, 1.3, -0.8], abs=1e-6)
    _, gradient = loss_and_gradient(logprobs, tokens, config(loss="cispo", clip_low=1.0))
    assert gradient == pytest.approx([-1.3, 1.3, -0.5], abs=1e-6)  # no lower bound


@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo"])
def test_the_only_step_over_a_batch_is_the_policy_gradient(loss: str) -> None:
    """The old policy is the current one: the ratio is 1, but not its gradient, -A whatever the loss."""
    tokens = batch([-1.0, -2.0], [3.0, -0.5])
    _, gradient = loss_and_gradient([-1.0, -2.0], tokens, config(loss=loss, importance="token"))
    assert gradient == pytest.approx([-3.0, 0.5])


def test_importance_by_token_and_by_trajectory() -> None:
    # Learner / engine: 3, 1/2 | 3/2, so 3/2 for the first trajectory. Old is the learner, so the gradient is -wA.
    tokens = batch([-1.0 - LOG3, -1.0 + LOG2, -1.0 - LOG3 + LOG2], [1.0] * 3, [0, 0, 1])
    for importance, cap, weights in (
        ("none", 2.0, [0.0, 0.5, 0.0]),  # PPO's ratio instead, clipped at 1.3
        ("token", 2.0, [2.0, 0.5, 1.5]),
        ("token", 1.2, [1.2, 0.5, 1.2]),
        ("sequence", 2.0, [1.5, 1.5, 1.5]),
        ("sequence", 1.2, [1.2, 1.2, 1.2]),
    ):
        algorithm = config(importance=importance, importance_cap=cap)
        _, gradient = loss_and_gradient([-1.0] * 3, tokens, algorithm)
        assert gradient == pytest.approx([-w for w in weights], abs=1e-6), importance


def test_later_steps_clip_against_the_old_policy_and_weigh_old_against_engine() -> None:
    # current / old: 2 (clipped: 1.3), 1.25; old / engine: 3 (capped: 2), 1/2. Current / engine: 6, 0.625.
    old = [-1.0 - LOG2, -1.0 - math.log(1.25)]
    tokens = batch([old[0] - LOG3, old[1] + LOG2], [1.0, 1.0])
    others = {"old_logprobs": torch.tensor(old)}
    loss, gradient = loss_and_gradient([-1.0, -1.0], tokens, config(importance="token"), **others)
    assert loss == pytest.approx(-(2.0 * 1.3 + 0.5 * 1.25), abs=1e-6)
    assert gradient == pytest.approx([0.0, -0.5 * 1.25], abs=1e-6)


@pytest.mark.parametrize(
    ("form", "value", "slope"),
    # r = pi_ref / pi = 2: k1 = -ln 2, k3 = 2 - 1 - ln 2; by log pi: 1 and 1 - r
    [("k1", -LOG2, 1.0), ("k3", 1.0 - LOG2, -1.0)],
)
def test_kl_in_the_loss_is_not_weighed_by_importance(form: str, value: float, slope: float) -> None:
    tokens = batch([-1.0 - LOG3], [0.0])
    others = {"reference_logprobs": torch.tensor([-1.0 + LOG2])}
    algorithm = config(kl_coef=0.5, kl=form, importance="token")
    loss, gradient = loss_and_gradient([-1.0], tokens, algorithm, **others)
    assert (loss, gradient) == (pytest.approx(0.5 * value, abs=1e-6), pytest.approx([0.5 * slope], abs=1e-6))
    loss, gradient = loss_and_gradient([-1.0], tokens, config(kl_coef=0.5, kl=form, kl_in="reward"), **others)
    assert (loss, gradient) == (0.0, [0.0])


def test_the_entropy_bonus_raises_entropy_and_asks_for_no_gradient_when_off() -> None:
    logprobs, entropy = torch.tensor([-1.0, -1.0], requires_grad=True), torch.tensor([0.5, 1.5], requires_grad=True)
    tokens = batch([-1.0 - LOG3, -1.0], [0.0, 0.0])
    loss = policy_loss(logprobs, entropy, tokens, config(entropy_coef=0.1, importance="token"))
    loss.backward()
    assert loss.item() == pytest.approx(-0.1 * (0.5 + 1.5))
    assert entropy.grad is not None and entropy.grad.tolist() == pytest.approx([-0.1, -0.1])
    entropy.grad = None
    policy_loss(logprobs, entropy, tokens, config()).backward()
    assert entropy.grad is None


@pytest.mark.parametrize(
    ("aggregate", "objective"),
    # Trajectories of 2 and 1 tokens, ratio 1, advantages 3 and 6, KL k1 of 1 per token at coefficient 0.3
    [
        ("token", (-(3 + 3 + 6) + 0.3 * 3) / 3),
        ("sequence", (-(3 + 6) + 0.3 * 2) / 2),
        ("constant", (-(3 + 3 + 6) + 0.3 * 3) / (2 * 5)),
    ],
)
def test_aggregation(aggregate: str, objective: float) -> None:
    algorithm = config(aggregate=aggregate, kl="k1", kl_coef=0.3)
    tokens = batch([-1.0] * 3, [3.0, 3.0, 6.0], [0, 0, 1])
    loss, _ = loss_and_gradient([-1.0] * 3, tokens, algorithm, reference_logprobs=torch.tensor([-2.0] * 3))
    assert loss / denominator(algorithm, tokens=3, sequences=2, max_new_tokens=5) == pytest.approx(objective)


def test_statistics_by_hand() -> None:
    # Learner / engine: 1, 2, 1/2, 1/2
    logprobs = torch.tensor([-1.0, -1.0, -1.0 - LOG2, -1.0 - LOG2])
    tokens = batch([-1.0, -1.0 - LOG2, -1.0, -1.0], [3.0, 1.0, -1.0, 1.0])
    entropy = torch.tensor([0.1, 0.2, 0.3, 0.4])

    def sums(**settings: Any) -> dict[str, float]:
        found = token_sums(logprobs, entropy, replace(tokens, reference_logprobs=logprobs + LOG2), config(**settings))
        return {name: value.item() for name, value in found.items()}

    engine = sums()
    assert engine[catalog.RATIO] == pytest.approx(1.0 + 2.0 + 0.5 + 0.5)
    assert engine[catalog.LOGPROB_MISMATCH] == pytest.approx(3 * LOG2)
    assert engine[catalog.ENTROPY] == pytest.approx(1.0)
    assert engine[catalog.KL] == pytest.approx(4 * (1.0 - LOG2), abs=1e-6)
    assert engine[catalog.CLIP_HIGH] == 1
    assert engine[catalog.CLIP_LOW] == 1  # the last token is below the bound, but its advantage is positive
    assert (engine[catalog.IMPORTANCE], engine[catalog.IMPORTANCE_CAPPED]) == (4.0, 0.0)
    assert sums(loss="cispo")[catalog.CLIP_LOW] == 2
    assert sums(kl="k1")[catalog.KL] == pytest.approx(-4 * LOG2)
    weighed = sums(importance="token", importance_cap=1.5)
    assert weighed[catalog.IMPORTANCE] == pytest.approx(1.0 + 1.5 + 0.5 + 0.5)
    assert weighed[catalog.IMPORTANCE_CAPPED] == 1
    assert weighed[catalog.RATIO] == pytest.approx(4.0)  # before truncation
    assert weighed[catalog.CLIP_LOW] == weighed[catalog.CLIP_HIGH] == 0  # nothing is old yet
    assert catalog.KL not in token_sums(logprobs, entropy, tokens, config())


TRAJECTORY = st.lists(st.tuples(*[st.floats(-3, 0)] * 4), min_size=1, max_size=4)


@given(st.lists(st.tuples(st.floats(-2, 2), TRAJECTORY), min_size=2, max_size=6), st.data())
def test_pieces_add_up_and_fillers_count_nowhere(step: list[tuple[float, Any]], data: st.DataObject) -> None:
    algorithm = config(
        loss=data.draw(st.sampled_from(["ppo", "gspo", "cispo"])),
        aggregate=data.draw(st.sampled_from(["token", "sequence", "constant"])),
        importance=data.draw(st.sampled_from(["none", "token", "sequence"])),
        kl_coef=0.1,
        entropy_coef=0.01,
    )

    def sums(part: list[tuple[float, Any]], fillers: int = 0) -> tuple[list[float], list[float]]:
        rows = [(*row, advantage, 1.0, i) for i, (advantage, own) in enumerate(part) for row in own]
        rows += [(-1.0, -0.5, -2.0, -1.5, 1.0, 0.0, len(part) - 1 + i // 2) for i in range(fillers)]
        new, engine, old, reference, advantages, real, sequence = torch.tensor(rows, dtype=torch.float64).T
        new = new.clone().requires_grad_()
        tokens = TokenBatch(
            rollout_logprobs=engine,
            advantages=advantages,
            loss_mask=real,
            sequence=sequence.long(),
            old_logprobs=old,
            reference_logprobs=reference,
        )
        loss = policy_loss(new, new.detach() ** 2, tokens, algorithm)
        loss.backward()
        values = token_sums(new.detach(), new.detach() ** 2, tokens, algorithm)
        assert new.grad is not None
        gradient = new.grad[real > 0].tolist()
        assert not new.grad[real == 0].any()
        return [loss.item(), *(value.item() for value in values.values())], gradient

    cut = data.draw(st.integers(1, len(step) - 1))
    (first, before), (second, after) = sums(step[:cut]), sums(step[cut:], fillers=3)
    whole, gradient = sums(step)
    assert whole == pytest.approx([a + b for a, b in zip(first, second, strict=True)], abs=1e-9)
    assert gradient == pytest.approx(before + after, abs=1e-9)


@given(st.floats(-20, 0), st.floats(-20, 0))
def test_k3_is_never_negative(a: float, b: float) -> None:
    assert kl(torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64), "k3").item() >= -1e-12


@pytest.mark.parametrize(
    ("log_ratio", "value", "slope"),
    # log pi_ref - log pi = d: k3 = e^d - 1 - d, its derivative to log pi 1 - e^d
    [
        (0.0, 0.0, 0.0),
        (1.0, math.e - 2, 1 - math.e),
        (-1.0, math.exp(-1), 1 - math.exp(-1)),
        (2.0, math.exp(2) - 3, 1 - math.exp(2)),
        (2.6, math.exp(2.6) - 3.6, 1 - math.exp(2.6)),  # 9.86, just below the bound
        (2.7, 10.0, 0.0),  # 11.2 without it
        (-11.0, 10.0, 0.0),
        (25.0, 10.0, 0.0),
        (1e4, 10.0, 0.0),
        (-1e4, 10.0, 0.0),
    ],
)
def test_k3_is_bounded_and_its_gradient_is_finite(log_ratio: float, value: float, slope: float) -> None:
    logprobs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    found = kl(logprobs, logprobs.detach() + log_ratio, "k3")
    found.sum().backward()
    assert found.item() == pytest.approx(value) and found.item() <= K3_CAP == 10.0
    assert logprobs.grad is not None and logprobs.grad.item() == pytest.approx(slope)


def test_one_token_far_from_the_reference_does_not_make_the_step() -> None:
    """In float32 too, where e^1e4 is infinite: the other token's gradient is what it is without it."""
    algorithm = config(kl="k3", kl_coef=0.5, importance="token")
    alone = loss_and_gradient([-1.0], batch([-1.0], [0.0]), algorithm, reference_logprobs=torch.tensor([-1.0 + LOG2]))
    reference = torch.tensor([-1.0 + LOG2, -1.0 + 1e4])
    both = loss_and_gradient([-1.0, -1.0], batch([-1.0] * 2, [0.0] * 2), algorithm, reference_logprobs=reference)
    assert both[0] == pytest.approx(alone[0] + 0.5 * 10) and both[1] == [alone[1][0], 0.0]


def test_an_unknown_surrogate_is_named_with_the_nearest() -> None:
    assert list(SURROGATES) == ["ppo", "gspo", "cispo"]
    with pytest.raises(UserError, match=r"no surrogate 'gsop'; did you mean 'gspo'\? \(known: ppo, gspo, cispo\)"):
        SURROGATES["gsop"]
