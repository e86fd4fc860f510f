"""Guards the samples of a run: checked at the start as far as that is cheap, and each again when it is drawn."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.run import samples
from launch.run.cursor import Cursor
from launch.run.samples import MAIN, load_samples
from perception.config import Config
from perception.datasets import Dataset
from perception.errors import DataError, SkippedRecordError, UserError
from perception.types import Sample
from tests import builders, tiny_policy
from tests.builders import changed, config, noise, png
from tests.tiny_families import build

SIDE = 112


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_policy.build(tmp_path_factory.mktemp("tiny")).path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for side in (SIDE, 2 * SIDE):
        (tmp_path / f"{side}.png").write_bytes(png(noise(0, side, side)))
    (tmp_path / "cut.png").write_bytes(png(noise(0, SIDE, SIDE))[:900])
    return tmp_path


def line(**changes: Any) -> dict[str, Any]:
    """Nothing is there, so that no truth is missing."""
    return {"image": f"{SIDE}.png", "question": "the red circle", "boxes": []} | changes


ONE = {"boxes": [[5, 5, 15, 10]]}


@pytest.fixture
def settings(tiny: Path, folder: Path) -> Config:
    """Prompt words for every task, a reward that needs no masks, four prompts a step."""
    words = config().task["segment"]
    plain = replace(config(folder), task=dict.fromkeys(("segment", "ground", "count"), words))
    plain = changed(plain, "reward", components={"count_ratio": 1.0}, ranked={})
    plain = changed(changed(plain, "model", path=str(tiny)), "algorithm", prompts_per_step=4)
    return changed(plain, "data", format="jsonl", train=str(folder / "train.jsonl"), eval=str(folder / "eval.jsonl"))


def write(config: Config, train: list[dict[str, Any]], held_out: list[dict[str, Any]] | None = None) -> None:
    for path, lines in ((config.data.train, train), (config.data.eval, held_out or [line()])):
        Path(path).write_text("".join(json.dumps(one) + "\n" for one in lines))


def loaded(config: Config, *train: dict[str, Any], held_out: list[dict[str, Any]] | None = None) -> Dataset:
    write(config, list(train), held_out)
    return load_samples(config)[0]


# ---------------------------------------------------------------- enough, tasks, truth


def test_data_must_fill_a_step_and_have_templates(settings: Config) -> None:
    assert len(loaded(settings, *[line()] * 4)) == 4
    with pytest.raises(UserError, match="holds 3 samples"):
        loaded(settings, *[line()] * 3)
    with pytest.raises(DataError, match=r"eval\.jsonl: line 1: the task is 'dance', .* add task\.dance") as caught:
        loaded(settings, *[line()] * 4, held_out=[line(task="dance")])
    assert caught.value.reason == "task"
    with pytest.raises(DataError, match=r"train\.jsonl: line 5: the task is 'dance'"):
        loaded(settings, *[line()] * 4, line(task="dance"))


@pytest.mark.parametrize("task", ["count", "ground"])
def test_a_task_without_masks_needs_none(settings: Config, task: str) -> None:
    """As README shows it: boxes alone make a data set for counting or grounding."""
    lines = [line(task=task, **ONE)] * 4
    assert loaded(settings, *lines, held_out=lines)[0].task == task
    looking = changed(settings, "look", mode="relook")
    for changed_settings, says in (
        (changed(settings, "reward", components={"mask_iou": 1.0}), "no masks, and reward=quickstart is measured by"),
        (changed(settings, "reward", rank="group"), "line 1: no masks"),
        (changed(looking, "rollout", max_images=2), "reward=quickstart with look=relook is measured by them"),
    ):
        with pytest.raises(DataError, match=says) as caught:
            loaded(changed_settings, *lines, held_out=lines)
        assert "\n" not in str(caught.value)
        assert caught.value.reason == "truth"


def test_held_out_segments_need_masks_and_the_line_is_named(settings: Config, folder: Path) -> None:
    train = [line(task="count", **ONE)] * 4
    mixed = [line(task="count", **ONE), line(), line(**ONE)]
    said = r"eval\.jsonl: line 3: no masks, and task segment is evaluated by mask_iou: add them"
    with pytest.raises(DataError, match=said):
        loaded(settings, *train, held_out=mixed)
    loaded(settings, *train, held_out=mixed[:2])
    also = changed(settings, "data", also={"shifted": str(folder / "shifted.jsonl")})
    (folder / "shifted.jsonl").write_text(json.dumps(mixed[2]))
    with pytest.raises(DataError, match=r"shifted\.jsonl: line 1: no masks"):
        loaded(also, *train)
    # the published form of the task is measured alike
    published = replace(settings, task=settings.task | {"mine": replace(settings.task["segment"], form="dr_seg")})
    with pytest.raises(DataError, match="task mine is evaluated by mask_iou"):
        loaded(published, *train, held_out=[line(task="mine", **ONE)])


# ---------------------------------------------------------------- lengths


def test_every_prompt_must_fit(settings: Config) -> None:
    # One token per byte: system 15, user 5, "Find ." 6, assistant 10, two line ends, seven chat tokens.
    text = 15 + 5 + 6 + 10 + 2 + 7
    lines = [*[line()] * 3, line(question="x" * 100), line(image=f"{2 * SIDE}.png")]
    needed = text + max(100 + 16, len("the red circle") + 64) + 64  # max_new_tokens
    loaded(changed(settings, "rollout", max_model_len=needed), *lines)
    says = rf"line 4: .*raise it to {needed} = {text + 100} text tokens \+ 16 image tokens"
    with pytest.raises(DataError, match=says) as caught:
        loaded(changed(settings, "rollout", max_model_len=needed - 1), *lines)
    assert caught.value.reason == "length"


def test_the_longest_question_is_found_behind_the_first_records(
    settings: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By tokens: 40 characters of three bytes each are longer than 100 letters."""
    monkeypatch.setattr(samples, "CHECKED", 2)
    many = [line(question=f"q{i}") for i in range(9)]
    text = 15 + 5 + 6 + 10 + 2 + 7
    longest = changed(settings, "rollout", max_model_len=text + 120 + 16 + 64 - 1)
    with pytest.raises(DataError, match=rf"line 7: .* {text + 120} text tokens"):
        loaded(longest, *many[:5], line(question="x" * 100), line(question="圆" * 40), *many[5:])


@pytest.mark.parametrize("family", ["llava_onevision", "internvl"])
def test_the_prompt_of_a_family_without_a_formula(family: str, settings: Config, tmp_path: Path) -> None:
    given = changed(settings, "model", path=build(family, tmp_path / "policy").path)
    # One token per character of "You see. USER: <image>\nFind xxx...x. ASSISTANT:", the image's one left out, and the
    # first token and the space before it.
    text = 2 + len("You see. USER: \nFind . ASSISTANT:") + 20
    image = {"llava_onevision": 88, "internvl": 22}[family]
    lines = [line(question="x" * 20), *[line()] * 3]
    loaded(changed(given, "rollout", max_model_len=text + image + 64), *lines)
    with pytest.raises(DataError, match=rf"raise it to {text + image + 64} = {text} text .* {image} image tokens"):
        loaded(changed(given, "rollout", max_model_len=text + image + 63), *lines)


def test_a_chat_template_that_does_not_show_the_image_is_refused(settings: Config, tiny: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    shutil.copytree(tiny, policy)
    given = changed(settings, "model", path=str(policy))
    (policy / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] }}{% endfor %}")
    with pytest.raises(UserError, match="chat template shows 0 images for one"):
        loaded(given, *[line()] * 4)
    (policy / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    with pytest.raises(UserError, match="no prompt can be built: no system role"):
        loaded(given, *[line()] * 4)


# ---------------------------------------------------------------- lazily, and bad records


def test_a_record_behind_the_first_ones_is_checked_when_it_is_drawn(
    settings: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "CHECKED", 4)
    train = loaded(settings, *[line()] * 5, line(image="nowhere.png"), line(task="dance"))
    assert train[4].id == "train:5"
    for index, says in ((5, r"line 6: no image nowhere\.png"), (6, "line 7: the task is 'dance'")):
        with pytest.raises(DataError, match=says):
            train[index]
    with pytest.raises(DataError, match=r"line [67]"):
        Cursor(train, seed=0).next(7)


def test_bad_records_are_left_out_and_counted(settings: Config, folder: Path) -> None:
    bad = [line(image="nowhere.png"), line(task="dance"), line(boxes=[[9, 9, 5, 5]]), {"question": "no image"}]
    good = [line(question=f"q{i}") for i in range(4)]
    skipping = changed(settings, "data", on_bad_record="skip", eval_samples=2)
    mixed = [one for pair in zip(bad, good, strict=True) for one in pair]
    write(skipping, mixed, held_out=[bad[0], *good])
    train, held_out = load_samples(skipping)
    assert [one.question for one in held_out[MAIN]] == ["q0", "q1"], "the first that can be used"
    assert train.skipped == {"image": 1, "task": 1, "box": 1, "record": 1}
    with pytest.raises(SkippedRecordError):
        train[0]
    with pytest.raises(DataError, match="line 1"):
        loaded(changed(skipping, "data", on_bad_record="stop"), *mixed)
    with pytest.raises(DataError, match=r"eval\.jsonl: no record can be used"):
        loaded(skipping, *mixed, held_out=bad)


def test_a_cursor_takes_the_next_record_for_one_that_is_left_out(settings: Config) -> None:
    """The place of a sample in the order is a function of the position alone: a resumed run draws the same."""
    lines = [line(question=f"q{i}", image="nowhere.png" if i % 3 == 1 else f"{SIDE}.png") for i in range(9)]
    train = loaded(changed(settings, "data", on_bad_record="skip"), *lines)
    drawn = [sample.id for sample in Cursor(train, seed=5).next(27)]
    good = {f"train:{i + 1}" for i in range(9) if i % 3 != 1}
    assert set(drawn[:9]) == good
    order = np.random.default_rng([5, 0]).permutation(9)
    kept = [int(i) for i in order if i % 3 != 1]
    assert drawn[0] == f"train:{kept[0] + 1}"
    for position in range(27):
        (again,) = Cursor(train, seed=5, position=position).next(1)
        assert again.id == drawn[position]
    with pytest.raises(DataError, match=r"every record was left out; the last: .*nowhere"):
        Cursor(_Nothing(), seed=0).next(1)


class _Nothing(list[Sample]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: Any) -> Any:
        raise SkippedRecordError("no image nowhere.png", "image")


def test_pixels_are_decoded_of_held_out_and_first_samples(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = line(image="cut.png")
    with pytest.raises(DataError, match=r"cut\.png: the image is damaged"):
        loaded(settings, *[line()] * 4, cut)
    with pytest.raises(DataError, match=r"cut\.png: the image is damaged"):
        loaded(settings, *[line()] * 4, held_out=[line(), cut])
    monkeypatch.setattr(samples, "_DECODED", 3)
    loaded(settings, *[line()] * 4, cut)


def test_evaluation_needs_no_training_data(settings: Config) -> None:
    write(settings, [], held_out=[line(question=f"q{i}") for i in range(3)])
    Path(settings.data.train).unlink()
    few = changed(changed(settings, "data", train=""), "algorithm", prompts_per_step=4000)
    train, held_out = load_samples(few)
    assert train == [] and [one.question for one in held_out[MAIN]] == ["q0", "q1", "q2"]
    with pytest.raises(DataError, match=r"train\.jsonl"):
        load_samples(settings)


def test_a_list_of_samples_serves_as_well() -> None:
    given = [builders.sample(f"s{i}") for i in range(3)]
    assert {one.id for one in Cursor(given, seed=0).next(3)} == {"s0", "s1", "s2"}
