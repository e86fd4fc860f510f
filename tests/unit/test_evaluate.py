"""Guards held-out evaluation: each task by its own metrics, named by task, measure, way and set, and their table."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from launch import evaluate as program
from launch import train as training
from launch.evaluate import SAMPLED_ANSWERS, evaluate, evaluate_all
from launch.record import run_directory
from launch.record.summary import changes, samples, show
from launch.run.state import RunState
from perception import metric_catalog as catalog
from perception.config import Config
from perception.errors import UserError
from perception.metric_catalog import GREEDY, SAMPLED, HeldOut, read_held_out
from perception.types import FailureKind, Group, Prompt, Sample, SamplingSpec, Trajectory
from tests import builders
from tests.builders import candidate, changed, config, group, lost, measured, sample, unparsed

SEGMENT = [sample(f"s{i}", task="segment") for i in range(2)]
COUNT = [sample("c0", task="count")]


class Answers:
    """Stands for the system: greedy answers of mask IoU 0.8 and right counts; of four sampled ones half are worse."""

    def __init__(self, mode: str = "none", fails: str = "") -> None:
        self.config = changed(config(), "look", mode=mode)
        self.asked: list[tuple[str, int, SamplingSpec, int]] = []
        self._fails = fails

    def prompts(self, samples: Sequence[Sample], step: int) -> list[Prompt]:
        return [builders.prompt(one, seed=step) for one in samples]

    async def answer(
        self, prompts: Sequence[Prompt], sampling: SamplingSpec, *, masks: int = 0, held_out: bool = False
    ) -> list[Group]:
        assert held_out, "measured by the task's metrics"
        self.asked += [(one.sample.id, one.seed, sampling, masks) for one in prompts]
        return [group(*self._answers(one.sample, sampling.n), about=one) for one in prompts]

    def _answers(self, asked: Sample, n: int) -> list[Trajectory]:
        if asked.id == self._fails:
            return [lost(FailureKind.SCORER, "the disk is full")] * n
        if asked.task == "count":
            right, wrong = measured(count_exact=1.0, count_ratio=1.0), measured(count_exact=0.0, count_ratio=0.5)
            return [right, wrong, right, wrong][:n]
        good = measured(candidate(0.4, 0.3), candidate(0.8, 0.9), mask_iou=0.8)  # a second look that was kept
        return [good, unparsed(mask_iou=0.0), measured(candidate(0.6), mask_iou=0.6), good][:n]


def run(system: Any, held_out: dict[str, Sequence[Sample]]) -> dict[str, float]:
    return asyncio.run(evaluate_all(system, held_out))[0]


@pytest.mark.parametrize(("mode", "train"), [("none", ""), ("inline", ""), ("relook", "data/train.jsonl")])
def test_training_data_are_read_only_where_something_is_learned_of_them(
    mode: str, train: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking again may have to be learned; a recipe's training data need not be there otherwise."""

    def check_files(settings: Config, phase: Any) -> Any:
        raise UserError(f"train={settings.data.train}")

    monkeypatch.setattr(program, "check_machine", lambda *_, **__: None)
    monkeypatch.setattr(program, "prepare", lambda *_, **__: None)
    monkeypatch.setattr(program, "check_files", check_files)
    settings = changed(changed(config(), "data", train="data/train.jsonl"), "look", mode=mode)
    with pytest.raises(UserError, match=rf"train={train}$"):
        program.run(settings)


def test_training_needs_training_data() -> None:
    with pytest.raises(UserError, match=r"no value for data\.train: give data\.train=\.\.\."):
        training.run(changed(config(), "data", train=""))


def test_a_mixed_set_reports_every_task_by_its_own_metrics() -> None:
    system = Answers()
    found = run(system, {"": [*SEGMENT, *COUNT]})
    assert found == pytest.approx(
        {
            "segment/mask_iou/greedy": 0.8,
            "segment/mask_iou/interval": 0.0,  # two equal samples; of a single one there is none
            "segment/mask_iou/sampled": (0.8 + 0.0 + 0.6 + 0.8) / 4,  # what did not parse is worth 0
            "segment/parsed/sampled": 3 / 4,
            "segment/samples/sampled": 2.0,
            "count/count_exact/greedy": 1.0,
            "count/count_ratio/greedy": 1.0,
            "count/count_exact/sampled": 0.5,
            "count/count_ratio/sampled": 0.75,
            "count/parsed/sampled": 1.0,
            "count/samples/sampled": 1.0,
        }
    )


def test_greedy_and_sampled_answers_are_asked_for_once_each_from_the_same_seeds() -> None:
    system: Any = Answers()
    asyncio.run(evaluate(system, SEGMENT, pictures=3))
    rollout = system.config.rollout
    greedy = SamplingSpec(n=1, temperature=0.0, max_new_tokens=rollout.max_new_tokens)
    several = SamplingSpec(n=SAMPLED_ANSWERS, temperature=rollout.temperature, max_new_tokens=rollout.max_new_tokens)
    assert system.asked == [(f"s{i}", 0, spec, 3) for spec in (greedy, several) for i in range(2)]


def test_further_sets_are_named_and_pictures_are_of_the_first() -> None:
    system: Any = Answers()
    metrics, groups = asyncio.run(evaluate_all(system, {"": SEGMENT, "shifted": COUNT}, 2))
    assert {one.held_out for one in read_held_out(metrics)} == {"", "shifted"}
    assert metrics["count/count_exact/greedy@shifted"] == 1.0 and "count/count_exact/greedy" not in metrics
    assert [one.prompt.sample.id for one in groups] == ["s0", "s1"]
    assert {name: masks for name, _, _, masks in system.asked} == {"s0": 2, "s1": 2, "c0": 0}


def test_looks_are_reported_where_the_policy_looks_again() -> None:
    """Two of four answers were looked at again, and each gained 0.4 in mask IoU; counts compare no masks."""
    found = run(Answers("relook"), {"": [*SEGMENT, *COUNT]})
    assert found[HeldOut("segment", catalog.LOOK_RATE).name] == pytest.approx(0.5)
    assert found[HeldOut("segment", catalog.LOOK_GAIN).name] == pytest.approx(0.2)
    assert found[HeldOut("count", catalog.LOOK_RATE).name] == 0.0
    assert HeldOut("count", catalog.LOOK_GAIN).name not in found


@pytest.mark.parametrize(("fails", "lost", "kept"), [("c0", "count", "segment"), ("s1", "segment", "count")])
def test_a_held_out_number_is_whole_or_absent(fails: str, lost: str, kept: str, caplog: Any) -> None:
    found = run(Answers("relook", fails=fails), {"": [*SEGMENT, *COUNT], "shifted": [*SEGMENT, *COUNT]})
    assert found and {one.task for one in read_held_out(found)} == {kept}
    assert caplog.messages[0] == f"no held-out numbers of task {lost}: sample {fails}: the disk is full"
    assert caplog.messages[1].startswith(f"no held-out numbers of task {lost} of shifted: sample {fails}")


def test_a_run_goes_on_where_nothing_could_be_evaluated() -> None:
    assert run(Answers(fails="c0"), {"": COUNT}) == {}
    assert changes({}, {"count/count_exact/greedy": 1.0}) == [] and samples({}) == 0


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("metric", "name", "label"),
    [
        (HeldOut("segment", "mask_iou", GREEDY), "segment/mask_iou/greedy", "gIoU, greedy answers"),
        (HeldOut("segment", "mask_iou"), "segment/mask_iou/sampled", "gIoU, sampled answers"),
        (
            HeldOut("ground", "box_accuracy", GREEDY, "shifted"),
            "ground/box_accuracy/greedy@shifted",
            "shifted: Acc@0.5, greedy answers",
        ),
        (HeldOut("count", catalog.PARSED), "count/parsed/sampled", "parsed"),
        (HeldOut("mine", "my_measure"), "mine/my_measure/sampled", "my_measure, sampled answers"),
        (
            HeldOut("segment", catalog.LOOK_RATE, SAMPLED, "a/b"),
            "segment/relook_rate/sampled@a/b",
            "a/b: looked at again",
        ),
    ],
)
def test_names_and_labels(metric: HeldOut, name: str, label: str) -> None:
    assert (metric.name, metric.label) == (name, label)
    assert read_held_out([name, "step", "samples", "policy/loss"]) == [metric]


# ---------------------------------------------------------------- the table


BEFORE = {
    "segment/mask_iou/greedy": 0.5,
    "segment/samples/sampled": 2,
    "count/count_exact/greedy": 0.25,
    "count/samples/sampled": 1,
    "segment/mask_iou/greedy@shifted": 0.3,
    "segment/samples/sampled@shifted": 7,
}
AFTER = BEFORE | {"segment/mask_iou/greedy": 0.75, "count/count_exact/greedy": 1.0}


def test_the_table_names_tasks_where_there_are_several() -> None:
    assert [(one.label, one.before, one.after) for one in changes(BEFORE, AFTER)] == [
        ("segment: gIoU, greedy answers", 0.5, 0.75),
        ("count: exact count, greedy answers", 0.25, 1.0),
        ("segment: shifted: gIoU, greedy answers", 0.3, 0.3),
    ]
    one_task = {name: value for name, value in BEFORE.items() if name.startswith("segment")}
    assert [one.label for one in changes(one_task, one_task)] == [
        "gIoU, greedy answers",
        "shifted: gIoU, greedy answers",
    ]
    assert samples(BEFORE) == 3  # of the set a run is judged by


def test_the_summary_says_what_the_held_out_set_was_read_as() -> None:
    settings = changed(config(), "data", format="reason_seg", options={"ignore": "drop"})
    state = RunState.start(settings, [*SEGMENT] * 16)
    assert state.summary({}, {})["data"] == "reason_seg, ignore=drop, texts=first, task=segment"


def test_an_evaluation_says_what_the_held_out_set_was_read_as(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def measured(*_: object) -> dict[str, float]:
        return {"giou": 0.5}

    for name in ("check_machine", "prepare", "cluster"):
        monkeypatch.setattr(program, name, Mock())
    monkeypatch.setattr(program, "check_files", lambda settings, phase: (SEGMENT, {"": SEGMENT}))
    monkeypatch.setattr(program, "_evaluate_once", measured)
    options = {"options": {"split": "train"}, "eval_options": {"split": "testA"}}
    program.run(changed(config(), "data", format="ref_coco", **options))
    said = json.loads(capsys.readouterr().out)
    assert said == {"giou": 0.5, "data": "ref_coco, split=testA, texts=all, task=segment"}


def test_what_a_finished_run_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"before": BEFORE, "after": AFTER, "steps": 12, "seconds": 34.4, "data": "reason_seg, ignore=drop"}
    restarts = {"rollout engines": 2, "reward workers": 0}
    left_out = {"image": 2, "box": 1}
    (tmp_path / run_directory.SUMMARY).write_text(json.dumps(summary | {"restarts": restarts, "left_out": left_out}))
    show(tmp_path)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "12 GRPO steps, 34 s, 3 held-out samples" in lines and "data: reason_seg, ignore=drop" in lines
    assert any("segment: gIoU, greedy answers" in line and "0.500 │ 0.750 │ +0.250" in line for line in lines)
    assert "restarted rollout engines 2x" in lines and "left out 2 image, 1 box records" in lines
    (tmp_path / run_directory.SUMMARY).unlink()
    show(tmp_path)
    assert "stopped with a checkpoint" in capsys.readouterr().out
