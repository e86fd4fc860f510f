"""Guards `launch.data`: what it counts, how it draws, what ends with status 2, and that no text of the data is code."""

from __future__ import annotations

import html
import json
import re
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from launch import data
from launch.run.config import settings
from perception import masks
from perception.datasets import READERS
from perception.datasets.records import Record
from perception.errors import DataError
from perception.types import Target
from tests import builders
from tests.builders import noise, png, rectangle

HOSTILE = "<script>alert(1)</script> \"'><img src=x onerror=alert(2)> [bold]{{ 7 * 7 }}[/bold] \u202e&amp;"


def jsonl(folder: Path, name: str, *lines: dict[str, Any] | str) -> Path:
    path = folder / name
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines), encoding="utf-8")
    return path


def line(**changes: Any) -> dict[str, Any]:
    return {"image": "a.png", "question": "the red car", "boxes": [[5, 5, 15, 10]]} | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.png is 30 wide and 20 high, b.png 60 and 40; cut.png breaks off after its header."""
    whole = png(noise(0, 20, 30))
    (tmp_path / "a.png").write_bytes(whole)
    (tmp_path / "b.png").write_bytes(png(noise(1, 40, 60)))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads in the place of processes, which `tests/stack/test_data_command.py` starts; and a wide terminal."""
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(data, "ProcessPoolExecutor", lambda cores, mp_context: ThreadPoolExecutor(cores))


def ended(*words: str) -> int:
    """Exit status of the command."""
    try:
        data.main(words)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_show_counts_by_task_and_draws_what_was_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = {"size": [20, 30], "counts": [0, 60, 540]}  # three columns
    lines = [
        line(),
        line(boxes=[]),
        line(mask=mask, boxes=None),
        line(image="b.png", boxes=[[0, 0, 4, 4], [1, 1, 9, 9]]),
    ]
    path = jsonl(folder, "t.jsonl", *lines, line(task="count", boxes=[[0, 0, 9, 9]] * 3), line(image="none.png"), "{")
    page = folder / "page.html"
    assert ended("show", "data.format=jsonl", f"data.train={path}", "--out", str(page)) == 0
    said = capsys.readouterr().out
    rows = [[cell.strip() for cell in row.split("│")[1:-1]] for row in said.splitlines() if row.startswith("│")]
    assert rows == [
        ["train", "count", "1", "0.0%", "3", "30x20"],
        ["train", "segment", "4", "25.0%", "0 / 1 / 2", "30x20 / 30x20 / 60x40"],
    ]
    assert "train: 2 of 7 questions cannot be used (image 1, record 1)" in said
    assert f"{path}: line 6: no image none.png" in said and f"page: {page}" in said
    text = page.read_text(encoding="utf-8")
    assert text.count('<figure class="card">') == 7 and text.count('class="tag">not usable') == 2
    assert text.count("data:image/png;base64,") == 5 and "://" not in text
    assert '<rect class="box" style="--c:hsl(145.0 95% 55%)" x="5.0" y="5.0" width="10.0" height="5.0"/>' in text
    assert len(re.findall('<path class="mask"', text)) == 1 and "nothing is there" in text and "3 objects" in text
    assert 'd="M0.5 0.5L0.5 19.5L2.5 19.5L2.5 0.5Z"' in text  # through the pixels' centres


def test_a_choice_is_the_same_for_a_seed_and_in_the_order_of_the_data(folder: Path) -> None:
    path = jsonl(folder, "t.jsonl", *(line(id=f"q{number:03d}") for number in range(300)))
    shown = []
    for seed in (1, 1, 2):
        page = folder / "page.html"
        assert (
            ended("show", f"data.train={path}", "data.format=jsonl", "--samples=5", f"--out={page}", f"run.seed={seed}")
            == 0
        )
        shown.append(re.findall(r">(q\d{3}) ·", page.read_text()))
    assert shown[0] == shown[1] == sorted(shown[0]) and len(set(shown[0])) == 5 and shown[0] != shown[2]


@pytest.mark.parametrize(
    ("place", "bad", "reason"),
    [
        ("train", {}, None),
        ("train", {"image": "cut.png"}, "image"),
        ("train", {"boxes": [[5, 5, 99, 10]]}, "record|box"),
        ("eval", {"image": "missing.png"}, "image"),
        ("eval", {"mask": {"size": [20, 30], "counts": "!!"}}, "record|mask"),
        ("also.second", {}, None),
        ("also.second", {"boxes": None}, "record|truth"),
    ],
)
def test_check_ends_with_2_where_one_record_of_any_set_is_bad(
    folder: Path, place: str, bad: dict[str, Any], reason: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [line() for _ in range(2 * data.CHUNK)]
    sets = {name: jsonl(folder, f"{name}.jsonl", line()) for name in ("train", "eval", "also.second")}
    sets[place] = jsonl(folder, f"{place}.jsonl", *good, line(**bad), line())
    words = [f"data.{name}={path}" for name, path in sets.items()]
    assert ended("check", "data.format=jsonl", *words) == (2 if reason else 0)
    told = capsys.readouterr().out
    name = place.removeprefix("also.")
    if reason:
        assert re.search(rf"^{name}: 1 of 514 questions cannot be used \(({reason}) 1\)$", told, re.M)
        assert f"line {len(good) + 1}" in told or "cut.png" in told
    else:
        assert f"{name}: 0 of 514 questions cannot be used" in told


def test_ten_problems_are_written_out_and_all_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = jsonl(folder, "t.jsonl", line(), *(line(image=f"{number}.png") for number in range(600)))
    assert ended("check", "data.format=jsonl", f"data.train={path}", "data.on_bad_record=skip") == 2
    told = capsys.readouterr().out
    assert "600 of 601 questions cannot be used (image 600)" in told
    assert re.findall(r"no image (\d+)\.png", told) == [str(number) for number in range(10)]


def test_what_cannot_be_listed_ends_with_2_and_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["data.train=nowhere.json", "data.format=coco"], "nowhere.json: no such file"),
        ([f"data.train={jsonl(folder, 'e.jsonl')}", "data.format=jsonl"], "the data set is empty"),
        (["data.train=x", "data.format=cocoo"], "no data format 'cocoo'; did you mean 'coco'?"),
        (["data.trian=x"], "did you mean 'data.train'?"),
    ):
        for action in ("show", "check"):
            assert ended(action, *words) == 2
            error = capsys.readouterr().err.strip().splitlines()
            assert len(error) == 1 and said in error[0]


def test_the_sets_that_are_named_are_read_and_no_other() -> None:
    for words, train, held_out in (
        ([], "data/world/train.json", "data/world/eval.json"),
        (["data.train=a"], "a", ""),
        (["data.eval=b"], "", "b"),
        (["recipe=quickstart", "data.train=a"], "a", "data/world/eval.json"),
    ):
        config = settings(words)
        assert (config.data.train, config.data.eval) == (train, held_out)


def read_hostile(path: Path) -> Any:
    rle = masks.encode(rectangle(0, 0, 10, 10, 20, 30))
    truth = Target(
        boxes=builders.target([(1, 2, 3, 4)]).boxes,
        points=builders.target([], [(2, 3)]).points,
        masks=(rle,),
        labels=(HOSTILE,),
        text=HOSTILE,
        ignore=rle,
        complete=False,
    )
    words = {"image": "a.png", "question": HOSTILE, "task": HOSTILE, "place": HOSTILE}
    for name, fault in (("a", None), ("b", DataError(HOSTILE, "text"))):
        yield Record(id=name + HOSTILE, truth=lambda *_: truth, fault=fault, **words)


def test_no_text_of_the_data_is_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(READERS._entries, "hostile", read_hostile)
    page = folder / "page.html"
    assert ended("show", "data.format=hostile", f"data.train={folder / 'x'}", "--out", str(page)) == 0
    text = page.read_text(encoding="utf-8")
    assert all(code not in text for code in ("<script", "<img", "\u202e", "]49["))
    shown = html.escape(HOSTILE.replace("\u202e", "\\u202e"), quote=True)
    assert text.count(shown.replace("&#x27;", "&#39;").replace("&quot;", "&#34;")) >= 7
    assert "a region is ignored" in text and "not all objects are given" in text
    assert "[bold]" in capsys.readouterr().out


def test_the_documents_name_every_layout_and_its_options() -> None:
    table = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    rows = [row.split("|")[1:] for row in table.splitlines() if row.startswith("| `") and row.count("|") == 5]
    named = {name: set(re.findall(r"\w+", row[3])) for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    for name in (one for one in READERS if READERS[one].__module__.startswith("perception.")):
        options = {one.name for one in signature(READERS[name]).parameters.values() if one.kind is one.KEYWORD_ONLY}
        assert options <= named[name], name
