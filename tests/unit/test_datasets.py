"""Guards data sets: records are listed, samples read and checked when drawn; readers by name; hostile segmentations."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from perception import masks
from perception.config import DataConfig
from perception.datasets import READERS, load, stated
from perception.datasets.objects import TrueObject, read_segmentation
from perception.datasets.records import Record
from perception.errors import DataError, SkippedRecordError, UserError
from perception.types import ImageSource, Sample
from tests.builders import dataset, noise

H, W = 20, 30


def lines(folder: Path, *names: str) -> Path:
    """One question about each of these images, of which the box is known."""
    path = folder / "mine.jsonl"
    written = [{"image": name, "question": "the red car", "boxes": [[5, 5, 15, 10]]} for name in names]
    path.write_text("\n".join(map(json.dumps, written)), encoding="utf-8")
    return path


def record(**changes: Any) -> Record:
    plain: dict[str, Any] = {"id": "1", "image": "a.png", "question": "q", "task": "segment", "truth": (), "place": "x"}
    return Record(**plain | changes)


@pytest.fixture
def listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Records of one's own, as the data set `mine` in the folder."""

    def listed(*records: Record, **changes: Any) -> Any:
        monkeypatch.setitem(READERS._entries, "mine", lambda path: iter(records))
        return dataset(folder / "labels.txt", "mine", **changes)

    return listed


# ---------------------------------------------------------------- samples, when they are drawn


def test_nothing_is_opened_before_it_is_drawn(folder: Path) -> None:
    data = dataset(lines(folder, "a.png", "late.png"))
    assert len(data) == 2
    (folder / "late.png").write_bytes((folder / "a.png").read_bytes())
    assert [one.id for one in data] == ["mine:1", "mine:2"]
    assert [one.id for one in data[1:]] == ["mine:2"]


def test_a_bad_record_stops_or_is_left_out_and_counted(folder: Path) -> None:
    path = lines(folder, "a.png", "nowhere.png", "a.png", "large.png")
    data = dataset(path, refuse_pixels=1000)
    with pytest.raises(DataError, match=rf"{path}: line 2: no image nowhere\.png") as caught:
        data[1]
    assert not isinstance(caught.value, SkippedRecordError) and caught.value.reason == "image"
    assert data.skipped == {}
    data = dataset(path, refuse_pixels=1000, on_bad_record="skip")
    assert [one.id for one in data.usable()] == ["mine:1", "mine:3"]
    assert [one.id for one in data.usable(start=1)] == ["mine:3"]
    assert data.skipped == {"image": 1, "size": 1}
    assert set(data.bad) == {"mine:2", "mine:4"}
    with pytest.raises(SkippedRecordError, match="nowhere"):
        data[1]


def test_a_further_check_names_the_place(folder: Path) -> None:
    path = lines(folder, "a.png")
    data = dataset(path)

    def check(sample: Sample) -> None:
        raise DataError(f"no room for {sample.question}", "length")

    data.check = check
    with pytest.raises(DataError, match=rf"^{path}: line 1: no room for the red car$") as caught:
        data[0]
    assert caught.value.reason == "length"


def test_truth_is_a_list_or_made_for_the_image(listed: Any) -> None:
    box = (1.0, 2.0, 3.0, 4.0)
    asked: list[tuple[int, int, str]] = []

    def truth(height: int, width: int, where: str) -> Any:
        asked.append((height, width, where))
        return plain.target

    plain = listed(record(truth=[TrueObject(box=box)]))[0]
    assert plain.target.boxes.tolist() == [list(box)]
    data = listed(record(truth=truth, place="cell 4"))
    assert asked == []
    assert data[0].target is plain.target
    assert [one[:2] for one in asked] == [(H, W)] and asked[0][2].endswith("labels.txt: cell 4")


def test_an_image_is_a_name_a_file_or_bytes(listed: Any, folder: Path) -> None:
    data = (folder / "a.png").read_bytes()
    for image in ("a.png", ImageSource(path=str(folder / "a.png")), ImageSource(path="line 3", data=data)):
        sample = listed(record(image=image))[0]
        assert (sample.height, sample.width) == (H, W)
    assert sample.image.data == data
    (folder / "elsewhere").mkdir()
    (folder / "a.png").rename(folder / "elsewhere" / "a.png")
    found = listed(record(), images=str(folder / "elsewhere"))[0]
    assert found.image.path == str(folder / "elsewhere" / "a.png")
    with pytest.raises(DataError, match=r"no image a\.png in .*set data\.images"):
        listed(record())[0]


@pytest.mark.parametrize(
    ("orientation", "stated", "says"),
    [
        (6, (30, 20), None),  # as displayed
        (6, (20, 30), r"photo\.jpg is 20x30 but the annotations say 30x20: its EXIF orientation was ignored"),
        (1, (20, 31), r"photo\.jpg is 30x20 but the annotations say 31x20: one of them was resized"),
        (1, (20, 30), None),
    ],
)
def test_the_stated_size_holds_for_the_image_as_displayed(
    listed: Any, folder: Path, orientation: int, stated: tuple[int, int], says: str | None
) -> None:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(noise(0, H, W)).save(buffer, "JPEG", exif=exif)
    (folder / "photo.jpg").write_bytes(buffer.getvalue())
    data = listed(record(image="photo.jpg", size=stated))
    if says is None:
        assert (data[0].height, data[0].width) == stated
    else:
        with pytest.raises(DataError, match=says) as caught:
            data[0]
        assert caught.value.reason == "size"


def test_no_question_and_an_id_that_stands_twice_are_named(listed: Any) -> None:
    with pytest.raises(DataError, match=r"labels\.txt: the data set is empty"):
        listed()
    twice = [record(id=name) for name in ("a", "b", "a", "a")]
    with pytest.raises(DataError, match=r"two samples have the id 'a' \(2 ids are there more than once\); make ids"):
        listed(*twice)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    for name in ("nowhere.json", "nowhere.jsonl"):
        with pytest.raises(DataError, match=rf"{name}: no such file"):
            dataset(tmp_path / name)
    for form in ("coco", "jsonl"):
        with pytest.raises(DataError, match="cannot be read"):
            dataset(tmp_path, form)


# ---------------------------------------------------------------- readers by name, with options


def test_a_reader_takes_the_options_of_its_signature(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Path, int, str]] = []

    def read(path: Path, /, *, every: int = 1, split: str) -> Iterator[Record]:
        seen.append((path, every, split))
        yield record(id="mine")

    monkeypatch.setitem(READERS._entries, "mine", read)
    (found,) = dataset(folder / "x.txt", "mine", options={"split": "val", "every": 3})
    assert (found.id, found.height, found.width) == ("mine", H, W)
    assert seen == [(folder / "x.txt", 3, "val")]
    for options, said in (
        (
            {"split": "val", "evry": 3},
            r"data\.options: unknown key 'evry'; did you mean 'every'\? \(known: every, split\)",
        ),
        ({"split": "val", "every": "three"}, r"data\.options\.every='three': Input should be a valid integer"),
        ({"every": 3}, r"data\.options: 'split' is missing; it has no default"),
    ):
        with pytest.raises(UserError, match=said):
            dataset(folder / "x.txt", "mine", options=options)


def test_held_out_sets_may_be_read_otherwise_and_figures_say_how(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, str]] = []

    def read(path: Path, /, *, split: str, every: int = 1, name: str = "") -> Iterator[Record]:
        seen.append((every, split))
        yield record(id="mine")

    monkeypatch.setitem(READERS._entries, "mine", read)
    config = DataConfig(format="mine", train="x", eval="x", options={"split": "train", "every": 2})
    held_out = replace(config, eval_options={"split": "val"})
    load(held_out, str(folder / "x"))
    load(held_out, str(folder / "x"), held_out=True)
    assert seen == [(2, "train"), (2, "val")]
    assert stated(held_out) == "mine, split=val, every=2"
    assert stated(replace(config, options={"split": "train"})) == "mine, split=train, every=1"
    with pytest.raises(UserError, match=r"data\.eval_options: unknown key 'splt'"):
        load(replace(config, eval_options={"splt": "val"}), "x", held_out=True)


def test_an_unknown_format_or_option_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no data format 'cocoo'; did you mean 'coco'\? \(known: .*coco"):
        dataset(lines(folder, "a.png"), "cocoo")
    with pytest.raises(UserError, match=r"data\.options: unknown key 'split'; there are none"):
        dataset(lines(folder, "a.png"), options={"split": "val"})


# ---------------------------------------------------------------- segmentations

numbers = st.one_of(st.integers(-5, 700), st.sampled_from([2**31, 2**63, 1e18, math.nan, None, True, "a", []]))
sizes = st.sampled_from([[H, W], [H, W], [W, H], [0, 0], [-1, W], [10**9, 10**9], [H], None, "x", [20.5, 30]])
segmentations = (
    st.fixed_dictionaries({"size": sizes, "counts": st.lists(numbers, max_size=6) | st.text("0PQoO`8 !é", max_size=12)})
    | st.lists(st.lists(st.floats(-70, 70) | numbers, max_size=9), max_size=3)
    | numbers
)


@settings(max_examples=200)
@given(segmentations)
def test_no_segmentation_crashes_the_reader(value: Any) -> None:
    """pycocotools trusts its input and corrupts memory; nothing damaged may reach it."""
    with suppress(DataError):
        mask = read_segmentation(value, H, W, "here")
        assert masks.decode(mask).shape == (H, W)


def test_a_polygon_covers_the_pixels_between_its_corners() -> None:
    mask = masks.decode(read_segmentation([[5, 5, 15, 5, 15, 10, 5, 10]], H, W, "here"))
    assert mask[5:10, 5:15].all() and np.count_nonzero(mask) == 50
