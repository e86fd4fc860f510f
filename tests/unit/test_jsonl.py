"""Guards the reader of JSONL files: what a line says is what its sample is, and every fault names its line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from perception import masks
from perception.errors import DataError
from tests.builders import dataset, rectangle

H, W = 20, 30


def write(folder: Path, *lines: dict | str) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def line(**changes: object) -> dict:
    return {"image": "a.png", "question": "the red car", "boxes": [[5, 5, 15, 10]]} | changes


def test_a_plain_line(folder: Path) -> None:
    (sample,) = dataset(write(folder, line(), ""))
    assert (sample.id, sample.question, sample.task) == ("mine:1", "the red car", "segment")
    assert (sample.height, sample.width, sample.image.path) == (H, W, str(folder / "a.png"))
    assert sample.target.boxes.tolist() == [[5, 5, 15, 10]]
    assert sample.target.points.tolist() == [[10, 7.5]]
    assert sample.target.masks == ()
    assert sample.target.boxes.dtype == sample.target.points.dtype == np.float32


def test_masks_come_as_png_or_run_lengths(folder: Path) -> None:
    rle = masks.encode(rectangle(5, 5, 15, 10, H, W))
    text = {"size": [H, W], "counts": rle.counts.decode()}
    column_major = {"size": [H, W], "counts": [5 * H + 5] + [5, H - 5] * 9 + [5, H * W - (14 * H + 10)]}
    lines = [line(mask=given) for given in ("mask.png", ["mask.png"], text, [text], column_major)]
    lines += [line(mask="mask.png") | {"boxes": None}]
    samples = list(dataset(write(folder, *lines)))
    assert len(samples) == 6
    for sample in samples:
        assert sample.target.masks == (rle,)
        assert sample.target.boxes.tolist() == [[5, 5, 15, 10]]
        x, y = sample.target.points[0]
        assert (5 <= x < 15, y) == (True, 7)


def test_nothing_there_and_other_tasks(folder: Path) -> None:
    two = line(task="count", boxes=[[0, 0, 2, 2], [4, 4, 6, 6]], points=[[1, 1], [5, 5]], id="two")
    nothing, found = dataset(write(folder, line(boxes=[]), two))
    assert (nothing.target.count, nothing.target.boxes.shape, nothing.target.points.shape) == (0, (0, 4), (0, 2))
    assert (found.id, found.task, found.target.points.tolist()) == ("two", "count", [[1, 1], [5, 5]])


@pytest.mark.parametrize("given", [7, "7"])
def test_an_id_may_be_a_number(folder: Path, given: int | str) -> None:
    assert [one.id for one in dataset(write(folder, line(id=given)))] == ["7"]


def test_a_byte_order_mark_is_none_of_the_text(folder: Path) -> None:
    path = write(folder, line())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [one.question for one in dataset(path)] == ["the red car"]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_lines_end_as_on_any_system(folder: Path, ending: str) -> None:
    path = folder / "mine.jsonl"
    path.write_bytes(ending.join([json.dumps(line()), "", json.dumps(line(question="2\u2028"))]).encode())
    assert [(one.id, one.question) for one in dataset(path)] == [("mine:1", "the red car"), ("mine:3", "2\u2028")]


@pytest.mark.parametrize(
    ("bad", "says", "reason"),
    [
        ('{"image": "a.png", ', "not valid JSON", "record"),
        ("[1, 2]", "Expected `object`, got `array`", "record"),
        ("[" * 100_000, "Expected `object`, got `array`", "record"),
        ('{"image": "a.png", "question": "q", "mask": {"a": ' + "[" * 100_000, "not valid JSON .*recursion", "record"),
        (b'{"image": "a.png", "question": "\xff\xfe"}', "not valid JSON", "record"),
        ({"image": "a.png", "boxes": []}, "missing required field `question`", "record"),
        (line(question=""), r"length >= 1 - at `\$\.question`", "record"),
        (line(boxes=[[1, 2, 3]]), r"`array` of length 4 - at `\$\.boxes\[0\]`", "record"),
        (line(boxes=[[1, 2, 3, "x"]]), r"`float`, got `str` - at `\$\.boxes\[0\]\[3\]`", "record"),
        ('{"image": "a.png", "question": "q", "boxes": [[1, 2, NaN, 4]]}', "not valid JSON", "record"),
        (line(boxes=[[1, 2, "NaN", 4]]), "leaves the 30x20 image", "box"),
        (line(points=[[1, "NaN"]]), "leaves the 30x20 image", "point"),
        (line(boxes=None), "neither boxes nor mask", "truth"),
        (line(boxes=[[15, 5, 5, 10]]), r"box \[15, 5, 5, 10\] is empty", "box"),
        (line(boxes=[[5, 5, 5, 10]]), "is empty", "box"),
        (line(boxes=[[5, 5, 32, 10]]), r"box \[5, 5, 32, 10\] leaves the 30x20 image", "box"),
        (line(boxes=[[-2, 5, 15, 10]]), "leaves the 30x20 image", "box"),
        (line(points=[[31, 22]]), r"point \[31, 22\] leaves", "point"),
        (line(points=[]), "0 in points for 1 objects", "truth"),
        (line(mask=["mask.png", "mask.png"]), "2 in mask for 1 objects", "truth"),
        (line(mask="small_mask.png"), "small_mask.png: the mask is 15x10 but the image 30x20", "mask"),
        (line(mask={"size": [H, W]}), "unreadable segmentation", "mask"),
        (line(mask={"size": [10, 15], "counts": [150]}), "the mask is 15x10", "mask"),
        (line(mask={"size": [H, W], "counts": [H * W]}), "no pixel", "mask"),
        (line(mask={"size": [H, W], "counts": "!!"}), "the run-length text is damaged", "mask"),
        (line(mask={"size": [H, W], "counts": [5, 10**6]}), "unreadable segmentation", "mask"),
        (line(image="nowhere.png"), "no image nowhere.png", "image"),
        (line(image="empty.png"), "empty", "image"),
        (line(image="corrupt.png"), "not a readable image", "image"),
        (line(image="large.png"), "1600 pixels, more than 1000", "size"),
    ],
)
def test_a_bad_line_is_named(folder: Path, bad: dict | str | bytes, says: str, reason: str) -> None:
    path = write(folder, line(), "")
    text = bad if isinstance(bad, bytes) else (bad if isinstance(bad, str) else json.dumps(bad)).encode()
    path.write_bytes(path.read_bytes() + b"\n" + text)
    data = dataset(path, refuse_pixels=1000)
    assert data[0].id == "mine:1"
    with pytest.raises(DataError, match=says) as caught:
        data[1]
    message = str(caught.value)
    assert "\n" not in message
    assert f"{path}: line 3" in message or ".png:" in message
    assert caught.value.reason == reason
