"""The ablation: intervals worked out by hand, verdicts, its tables, and what is trained again."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import ablation, ablation_table
from benchmarks.ablation import Planned, finished, plan, run_name, write_results
from benchmarks.ablation_table import Interval, change, interval, verdict
from launch.record.recorder import Recorder
from launch.run.config import compose
from perception import metric_catalog as catalog
from perception.errors import UserError
from perception.metric_catalog import GREEDY, SAMPLED, HeldOut

T_2 = 4.302652729911275  # 97.5 % quantile of Student's t with 2 degrees of freedom
SEEDS = (42, 1, 2)
AFTER = {"binary": (0.50, 0.51, 0.52), "rank": (0.53, 0.54, 0.56), "relook": (0.50, 0.55, 0.45)}


def evaluation(sampled: float) -> dict[str, float]:
    found = {}
    for held_out, shift in (("", 0.0), ("shifted", 0.2)):
        found |= {
            HeldOut("segment", "mask_iou", SAMPLED, held_out).name: sampled - shift,
            HeldOut("segment", "mask_iou", GREEDY, held_out).name: sampled + 0.1 - shift,
            HeldOut("segment", catalog.SAMPLES, SAMPLED, held_out).name: 128,
        }
    return found


GIOU = HeldOut("segment", "mask_iou").name


def write(planned: Planned, after: float, before: float = 0.4, steps: int = 12) -> None:
    """A finished run, by the real recorder: metrics that are easy to average."""
    with Recorder(planned.config) as recorder:
        recorder.evaluation(0, evaluation(before))
        for step in range(1, steps + 1):
            metrics = {
                catalog.REWARD_STD: 0.1 * (step % 2),
                catalog.ZERO_VARIANCE: 0.25,
                catalog.ENTROPY: float(step) if step > 1 else math.nan,
                catalog.RESPONSE_TOKENS: 30.0,
                catalog.SECONDS_STEP: 100.0 if step == 1 else 2.0,
            }
            recorder.step(step, metrics, [])
        recorder.evaluation(steps, evaluation(after))
        recorder.summary({"before": evaluation(before), "after": evaluation(after), "steps": steps, "seed": 0})


def write_all(out: Path, extra: Sequence[str] = ()) -> list[tuple[str, int]]:
    for arm, values in AFTER.items():
        for seed, after in zip(SEEDS, values, strict=True):
            write(plan(arm, seed, 12, out, extra), after)
    return [(arm, seed) for arm in AFTER for seed in SEEDS]


@pytest.fixture(scope="module", autouse=True)
def composed_once() -> Iterator[None]:
    """Composing settings takes the most part of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "compose", cache(compose))
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    write_results(folder, write_all(folder), "the command")
    return folder


@pytest.fixture(scope="module")
def runs(out: Path) -> ablation_table.Runs:
    return {arm: {seed: ablation_table.read(out / run_name(arm, seed)) for seed in SEEDS} for arm in AFTER}


def test_the_interval_is_students_over_the_seeds() -> None:
    found = interval([1.0, 2.0, 3.0])  # standard deviation 1
    assert (found.mean, found.n) == (2.0, 3) and found.half == pytest.approx(T_2 / math.sqrt(3))
    assert interval([0.5]) == Interval(0.5, None, 1)
    assert interval([0.5]).text() == "+0.500" and found.text(digits=1) == "+2.0 ± 2.5"


def test_the_difference_is_paired_by_seed(runs: ablation_table.Runs) -> None:
    """0.03, 0.03 and 0.04: far narrower than what the arms themselves scatter."""
    found = change(runs, "rank", GIOU).less_binary
    assert found is not None and found.mean == pytest.approx(0.1 / 3)
    assert found.half == pytest.approx(T_2 * 0.01 / 3)  # standard deviation 0.01 / sqrt 3, over 3 seeds
    fewer = {"binary": {1: runs["binary"][1]}, "rank": runs["rank"]}
    one = change(fewer, "rank", GIOU).less_binary
    assert one is not None and (one.n, one.half) == (1, None) and one.mean == pytest.approx(0.03)
    assert change({"rank": runs["rank"]}, "rank", GIOU).less_binary is None
    assert change(runs, "binary", GIOU).less_binary is None


@pytest.mark.parametrize(
    ("claimed", "found", "said"),
    [
        (1, Interval(0.03, 0.01, 3), "agrees"),
        (-1, Interval(0.03, 0.01, 3), "disagrees"),
        (0, Interval(0.03, 0.01, 3), "disagrees"),
        (-1, Interval(-0.03, 0.01, 3), "agrees"),
        (1, Interval(0.03, 0.03, 3), "not resolved"),
        (0, Interval(0.0, 0.01, 3), "not resolved"),
        (1, Interval(0.03, None, 1), "not resolved"),
        (1, None, "not run"),
    ],
)
def test_verdicts(claimed: int, found: Interval | None, said: str) -> None:
    assert verdict(claimed, found) == said


def test_a_runs_figures(runs: ablation_table.Runs) -> None:
    """Entropy of step 1 is not known: 2 to 6 are the first five. The slow first step does not count for the seconds."""
    expected = {"reward_std": 0.05, "zero_variance": 0.25, "entropy_start": 4.0, "entropy_end": 10.0}
    expected |= {"response_tokens": 30.0, "step_s": 2.0}
    assert runs["rank"][1].training == pytest.approx(expected)


def test_the_tables(out: Path) -> None:
    text = (out / "ablation.md").read_text()
    assert (
        "    the command\n" in text
        and "Seeds: 42, 1, 2 (n = 3). Steps: 12. Samples per step: 32 prompts x 8 answers." in text
    )
    in_domain = "0.400 -> 0.543 | +0.143 ± 0.038 | +0.033 ± 0.014"
    assert f"| +rank | 3 | {in_domain} | 0.200 -> 0.343 | +0.143 ± 0.038 | +0.033 ± 0.014 |" in text
    assert "| +rank | in domain | +1.3 | up | +3.3 ± 1.4 | agrees |" in text
    assert "| +rank | out of domain | +0.0 | no change | +3.3 ± 1.4 | disagrees |" in text
    assert "| +look | in domain | -0.2 | no change |  | not run |" in text
    assert "| raw sum | out of domain | -1.1 | down |  | not run |" in text
    written = json.loads((out / "ablation.json").read_text())
    assert len(written["runs"]) == 9 and written["command"] == "the command"
    assert written["arms"]["relook"][GIOU]["gains"]["2"] == pytest.approx(0.05)


def test_runs_with_different_settings_do_not_share_a_table(tmp_path: Path) -> None:
    write(plan("binary", 1, 12, tmp_path, ()), 0.5)
    write(plan("rank", 1, 12, tmp_path, ("learner.lr=3e-5",)), 0.5)
    with pytest.raises(UserError, match="ablation-rank-1 and ablation-binary-1 differ in more than arm and seed"):
        write_results(tmp_path, [("binary", 1), ("rank", 1)], "")


def test_a_finished_run_stands_only_for_its_own_settings_and_warm_start(tmp_path: Path) -> None:
    weights = tmp_path / "policy/model.safetensors"
    weights.parent.mkdir()
    weights.touch()
    extra = (f"model.path={weights.parent}",)
    planned = plan("both", 1, 12, tmp_path, extra)
    assert not finished(planned)
    write(planned, 0.5)
    assert finished(planned)
    assert not finished(plan("both", 1, 60, tmp_path, extra))
    assert not finished(plan("both", 1, 12, tmp_path, (*extra, "learner.lr=3e-5")))
    later = time.time() + 60
    os.utime(weights, (later, later))
    assert not finished(planned)


def test_only_what_is_missing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(plan("binary", 1, 12, tmp_path, ()), 0.5)
    write(plan("rank", 1, 11, tmp_path, ()), 0.5)
    trained = []

    async def stand_in(commands, out, at_once, limit_s, done) -> None:
        for name in commands:
            trained.append(name)
            write(plan(name.split("-")[1], 1, 12, out, ()), 0.6)
            done(name)

    monkeypatch.setattr(ablation, "run_all", stand_in)
    monkeypatch.setattr(ablation, "prepare", lambda config, say: None)
    arguments = SimpleNamespace(out=tmp_path, steps=12, overrides=(), jobs=1, limit_s=1)
    ablation.train([("binary", 1), ("rank", 1), ("raw", 1)], arguments, "again")
    assert trained == ["ablation-rank-1", "ablation-raw-1"]
    assert len(json.loads((tmp_path / "ablation.json").read_text())["runs"]) == 3


def test_every_arm_fits_the_settings(tmp_path: Path) -> None:
    found = {arm: plan(arm, 1, 60, tmp_path, ()).config for arm in ablation.ARMS}
    assert {arm: config.look.mode for arm, config in found.items()} == {
        "binary": "none", "look": "inline", "rank": "none", "both": "inline", "raw": "inline", "relook": "relook"
    }  # fmt: skip
    form = {"think_format": 1.0, "answer_format": 1.0}
    assert {arm: config.reward.components for arm, config in found.items()} == {
        "binary": form | {"non_repeat_plain": 1.0, "vision_reasoner_accuracy": 1.0},
        "look": form | {"non_repeat": 1.0, "vision_reasoner_accuracy": 1.0, "look": 1.0},
        "rank": form | {"non_repeat": 1.0},
        "both": form | {"non_repeat": 1.0, "look": 1.0},
        "raw": form | {"non_repeat": 1.0, "look": 1.0},
        "relook": form | {"non_repeat": 1.0},
    }
    assert {arm for arm, config in found.items() if not config.reward.ranked} == {"binary", "look"}
    assert [arm for arm, config in found.items() if config.reward.rank == "ecdf"] == ["rank", "both", "relook"]
    assert all(set(config.data.also) == {"shifted"} for config in found.values())
    with pytest.raises(UserError, match="lr"):
        plan("both", 1, 60, tmp_path, ("learner.lr=fast",))
