"""Guards what rollouts keep and reports show of labels, of several points on and beside an object, of texts read."""

from __future__ import annotations

import re
from pathlib import Path

from launch.record import rollouts
from launch.record.recorder import Recorder
from perception.types import Answer, AnswerObject, Group, ImageSource, Target
from report import write_report
from tests import builders
from tests.fake_run import config

OBJECTS = (
    AnswerObject(
        box=(10, 20, 50, 60), label="dog", point=(30, 40), further=((31, 41), (32, 42)), background=((12, 22),)
    ),
    AnswerObject(point=(5, 6), label="no box"),
    AnswerObject(box=(1, 2, 3, 4)),
    AnswerObject(box=(60, 60, 70, 70), label="<b>cat</b>"),
    AnswerObject(background=((7, 8), (9, 10))),
)


def answered(folder: Path, text: str | None) -> Group:
    """One answer of these objects to a question of which `text` is the truth."""
    (folder / "image.png").write_bytes(builders.png(builders.noise(0)))
    empty = builders.target()
    truth = Target(boxes=empty.boxes, points=empty.points, complete=False, text=text)
    asked = builders.sample(truth=truth, image=ImageSource(path=str(folder / "image.png")))
    said = builders.trajectory(
        "said", score=builders.score(builders.candidate(answer=Answer(objects=OBJECTS))), reward=1.0
    )
    return builders.group(said, about=builders.prompt(asked))


def test_rollouts_keep_all_points_and_a_label_for_every_box(tmp_path: Path) -> None:
    rollouts.write(tmp_path / "some.parquet", 1, [answered(tmp_path, "two\nlines"), answered(tmp_path, None)])
    first, second = rollouts.read(tmp_path / "some.parquet")
    for row in (first, first["passes"][0]):
        assert row["boxes"] == [[10, 20, 50, 60], [1, 2, 3, 4], [60, 60, 70, 70]]
        assert row["labels"] == ["dog", "", "<b>cat</b>"]
        assert row["points"] == [[30, 40], [31, 41], [32, 42], [5, 6]]
        assert row["background"] == [[12, 22], [7, 8], [9, 10]]
    assert (first["truth_texts"], second["truth_texts"]) == (["two\nlines"], [])


def test_the_report_shows_them(tmp_path: Path) -> None:
    with Recorder(config(tmp_path)) as recorder:
        recorder.step(1, {}, [answered(tmp_path, "5 < 6")])
    page = write_report(recorder.run_dir).read_text()
    drawn = page[page.index('class="answer"') :]
    assert re.findall(r'<text x="([\d.]+)" y="([\d.]+)".*?>(.*?)</text>', drawn) == [
        ("10.0", "20.0", "dog"),
        ("60.0", "60.0", "&lt;b&gt;cat&lt;/b&gt;"),
    ]
    assert re.findall(r'class="point core" d="M([\d.]+) ', drawn) == [f"{x}.0" for x in (30, 31, 32, 5, 12, 7, 9)]
    assert re.findall(r'class="point off" d="M([\d.]+) ', drawn) == ["12.0", "7.0", "9.0"]
    assert "<pre>5 &lt; 6</pre>" in page


def test_nothing_to_read_nothing_shown(tmp_path: Path) -> None:
    with Recorder(config(tmp_path)) as recorder:
        recorder.step(1, {}, [answered(tmp_path, None)])
    assert "<pre></pre>" not in write_report(recorder.run_dir).read_text()
