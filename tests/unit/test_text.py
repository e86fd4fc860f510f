"""Guards text that cannot be encoded: half a surrogate pair, from an answer, a data set, the settings or a file's name,
neither ends a run nor is lost without a trace; all other text stays as it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.record import rollouts
from launch.record.recorder import Recorder
from launch.run.prompts import PromptMaker
from perception.config import DataConfig, LookConfig, ModelConfig, RewardConfig, TaskConfig
from perception.datasets import load
from perception.datasets.files import parse
from perception.errors import DataError
from perception.grammar import clean, clean_json
from perception.grammar import load as load_json
from perception.tasks import TASKS
from perception.types import ImageSource
from report import write_report
from reward_workers.worker import RewardWorker
from tests import builders, tiny_policy
from tests.builders import group, image, lost, noise, png, trajectory
from tests.fake_run import config
from tests.hostile_text import completions

HALVES = ["\ud800", "\udfff", "a\udbffz", "\udc00\ud800", "\ud83d\ud83d\ude00"]
PLAIN = ["", "é 漢字 😀", "\x00", "\u202e", "\ufffd", "\\ud800", "\n\t\"'\\", "\uffff\U0010ffff"]
BOX = '"bbox_2d": [1, 2, 30, 40], "point_2d": [3, 4]'
anything = st.text(st.characters(codec=None, exclude_categories=()), max_size=20)


@given(anything)
def test_clean_text_can_be_encoded_and_only_halves_are_replaced(text: str) -> None:
    found = clean(text)
    found.encode("utf-8")
    assert [a if a == b else "half" for a, b in zip(text, found, strict=True)] == [
        "half" if 0xD800 <= ord(c) <= 0xDFFF else c for c in text
    ]
    assert clean(found) == found


@given(st.recursive(anything | st.integers() | st.none(), lambda one: st.lists(one) | st.dictionaries(anything, one)))
def test_json_is_read_as_python_reads_it_but_for_halves(value: Any) -> None:
    """Written with escapes and without; a pair of neighbouring halves is a character, as in `json`."""
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        expected = json.loads(clean(json.dumps(json.loads(text), ensure_ascii=False)))
        if "\\u" in text or clean(text) == text:
            assert load_json(text) == expected
        json.dumps(load_json(text), ensure_ascii=False).encode("utf-8")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r'"\ud83d\ude00"', "😀"),
        (r'"\\ud800"', r"\ud800"),
        (r'"\\\ud800"', "\\\ufffd"),
        (r'"\uD800\u0041"', "\ufffdA"),
        (r'"\uDC00\uD83D\uDE00\uD83D"', "\ufffd😀\ufffd"),
        (r'{"\udfff": "\u00e9"}', {"\ufffd": "é"}),
    ],
)
def test_escapes(text: str, value: object) -> None:
    assert load_json(text) == value


@pytest.mark.parametrize("text", [r'"\ud8zz"', r'"\ud8', r'"\q"'])
def test_what_was_no_json_is_none_still(text: str) -> None:
    with pytest.raises(ValueError, match=r"\\|[Uu]nterminated"):
        load_json(text)
    assert clean_json(text) == text


@pytest.mark.parametrize("hostile", [*HALVES, *PLAIN])
@pytest.mark.parametrize("escaped", [True, False])
def test_an_answer_is_scored_recorded_and_reported(tmp_path: Path, hostile: str, escaped: bool) -> None:
    """parse -> Score -> rollouts -> report, the text being in the answer, the question, a failure and a file's name."""
    label = json.dumps(hostile, ensure_ascii=escaped)
    text = f'<think></think><answer>[{{{BOX}, "label": {label}}}, {{{BOX}}}]</answer>'
    picture = image(noise(0))
    asked = builders.sample(question=clean(hostile), image=ImageSource(path=f"{hostile}.png", data=picture.ref))
    reward = RewardConfig(name="r", components={"parsed": 1.0, "non_repeat": 1.0, "dr_seg_count": 1.0})
    worker = RewardWorker(reward, LookConfig(), ModelConfig(path="", segmenter=""), "cpu", 1)
    worker.start()
    about = builders.prompt(asked, images=(picture,))
    scored = worker.score(group(trajectory(clean(text)), lost(detail=f"no file {hostile}"), about=about))
    first = scored.trajectories[0]
    assert first.score is not None and first.score.metrics["parsed"] == 1.0
    with Recorder(config(tmp_path)) as recorder:
        recorder.step(1, {}, [scored])
    row, other = rollouts.read(tmp_path / "quickstart" / "rollouts" / "train-000001.parquet")
    expected = clean(json.loads(json.dumps(hostile))) if escaped else clean(hostile)  # escapes may make a pair
    assert row["labels"] == [expected, ""]
    assert row["question"] == clean(hostile) and row["image"] == f"{clean(hostile)}.png"
    assert other["failure_detail"] == f"no file {clean(hostile)}"
    assert write_report(recorder.run_dir).read_bytes().decode("utf-8")


def test_mutated_completions_can_be_recorded(tmp_path: Path) -> None:
    """Halves among many other things no one would write, as labels above all."""
    texts = [one.replace('"point_2d"', f'"label": "{one[:9]}\\udc00", "point_2d"') for one in completions(600, seed=11)]
    answers = [TASKS["segment"].parse(clean(one)) for one in texts]
    scores = [builders.score(builders.candidate(answer=one)) for one in answers]
    made = (trajectory(clean(text), score=score) for text, score in zip(texts, scores, strict=True))
    rollouts.write(tmp_path / "one.parquet", 1, [group(*made)])
    found = [row["labels"] for row in rollouts.read(tmp_path / "one.parquet")]
    assert found == [[item.label or "" for item in one.objects if item.box] for one in answers]
    assert sum("\ufffd" in label for labels in found for label in labels) > 30


@pytest.mark.parametrize("half", [r"\ud83d", r"\udc00x", r"\uD800\uD800"])
def test_a_data_set_with_cut_texts_is_read(tmp_path: Path, half: str) -> None:
    """A caption cut inside a character, as scripts that count UTF-16 do."""
    (tmp_path / "a.png").write_bytes(png(noise(0)))
    line = f'{{"image": "a.png", "question": "a cat {half}", "id": "{half}", "boxes": [[1, 2, 30, 40]]}}\n'
    (tmp_path / "data.jsonl").write_text(line, encoding="utf-8")
    settings = DataConfig(format="jsonl", train="", eval="")
    (sample,) = load(settings, str(tmp_path / "data.jsonl"))
    assert sample.question.startswith("a cat \ufffd") and sample.id.startswith("\ufffd")
    sample.question.encode("utf-8")


class Named(msgspec.Struct):
    name: str


@pytest.mark.parametrize("data", [b'{"name": "\\ud800"', b'{"name": "\xff"}', b'{"name": \\ud800}'])
def test_what_else_is_wrong_with_a_file_is_said(data: bytes) -> None:
    with pytest.raises(DataError, match=r"labels\.json: not valid JSON"):
        parse(Named, data, "labels.json")


@pytest.mark.parametrize("half", HALVES)
def test_settings_and_questions_reach_the_tokenizer(half: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "policy"
    if not path.exists():
        tiny_policy.build(path)
    form = TaskConfig(system=f"S{half}", template="Find {question}" + half, inline="{question}", again=f"A{half}")
    maker = PromptMaker(ModelConfig(path=str(path), segmenter=""), {"segment": form})
    asked = builders.sample(question=f"the cat {half}")
    clean_form = {name: clean(getattr(form, name)) for name in ("system", "template", "inline", "again")}
    plain = PromptMaker(ModelConfig(path=str(path), segmenter=""), {"segment": replace(form, **clean_form)})
    for inline in (True, False):
        assert maker.tokens(asked, inline) == plain.tokens(replace(asked, question=clean(asked.question)), inline)
    assert maker.again("segment") == plain.again("segment")
