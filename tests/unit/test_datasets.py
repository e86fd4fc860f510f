"""Guards the readers: what is on disk is what a sample says, and every fault is one line naming where and what."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception import masks
from perception.config import DataConfig
from perception.datasets import READERS, coco, jsonl, load
from perception.datasets.files import Images
from perception.datasets.objects import read_segmentation
from perception.errors import DataError, UserError
from perception.types import Sample
from tests import builders
from tests.builders import noise, png, rectangle

H, W = 20, 30


def config(path: Path, **changes: Any) -> DataConfig:
    kind = "coco" if path.suffix == ".json" else "jsonl"
    return DataConfig(**{"format": kind, "train": str(path), "eval": str(path)} | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image a.png of 30x20, and a broken one of each kind."""
    data = png(noise(0, H, W))
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "corrupt.png").write_bytes(b"\x89PNG and then nothing")
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "large.png").write_bytes(png(np.zeros((40, 40), np.uint8)))
    (tmp_path / "mask.png").write_bytes(png(rectangle(5, 5, 15, 10, H, W).astype(np.uint8) * 255))
    (tmp_path / "small_mask.png").write_bytes(png(np.ones((10, 15), np.uint8)))
    (tmp_path / "black.png").write_bytes(png(np.zeros((H, W), np.uint8)))
    return tmp_path


# ---------------------------------------------------------------- JSONL


def write_lines(folder: Path, *lines: dict | str) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def line(**changes: Any) -> dict:
    return {"image": "a.png", "question": "the red car", "boxes": [[5, 5, 15, 10]]} | changes


def test_a_plain_line(folder: Path) -> None:
    (sample,) = load(config(write_lines(folder, line(), "")), "train")
    assert (sample.id, sample.question, sample.task) == ("mine:1", "the red car", "segment")
    assert (sample.height, sample.width, sample.image_path) == (H, W, str(folder / "a.png"))
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
    for sample in load(config(write_lines(folder, *lines)), "eval"):
        assert sample.target.masks == (rle,)
        assert sample.target.boxes.tolist() == [[5, 5, 15, 10]]
        x, y = sample.target.points[0]
        assert (5 <= x < 15, y) == (True, 7)


def test_nothing_there_and_other_tasks(folder: Path) -> None:
    path = write_lines(
        folder,
        line(boxes=[]),
        line(task="count", boxes=[[0, 0, 2, 2], [4, 4, 6, 6]], points=[[1, 1], [5, 5]], id="two"),
    )
    nothing, two = load(config(path), "eval")
    assert (nothing.target.count, nothing.target.boxes.shape, nothing.target.points.shape) == (0, (0, 4), (0, 2))
    assert (two.id, two.task, two.target.points.tolist()) == ("two", "count", [[1, 1], [5, 5]])


def test_a_pixel_of_slack_is_clipped(folder: Path) -> None:
    path = write_lines(folder, line(boxes=[[-1, -0.5, W + 1, H]]))
    (found,) = jsonl.read(path, Images(path, 1000))
    assert found.target.boxes.tolist() == [[0, 0, W, H]]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"image": "a.png", ', "not one JSON object"),
        ("[1, 2]", "record: "),
        ("[" * 100_000, "not one JSON object"),
        ({"image": "a.png", "boxes": []}, "question: Field required"),
        (line(question=""), "question: "),
        (line(boxes=[[1, 2, 3]]), "boxes.0.3: Field required"),
        (line(boxes=[[1, 2, 3, "x"]]), "boxes.0.3: "),
        (
            '{"image": "a.png", "question": "q", "boxes": [[1, 2, NaN, 4]]}',
            "boxes.0.2: Input should be a finite number",
        ),
        (line(boxes=None), "neither boxes nor mask"),
        (line(boxes=[[15, 5, 5, 10]]), r"box \[15, 5, 5, 10\] is empty"),
        (line(boxes=[[5, 5, 5, 10]]), "is empty"),
        (line(boxes=[[5, 5, 32, 10]]), r"box \[5, 5, 32, 10\] leaves the 30x20 image"),
        (line(boxes=[[-2, 5, 15, 10]]), "leaves the 30x20 image"),
        (line(points=[[31, 22]]), r"point \[31, 22\] leaves"),
        (line(points=[]), "0 in points for 1 objects"),
        (line(mask=["mask.png", "mask.png"]), "2 in mask for 1 objects"),
        (line(mask="small_mask.png"), "the mask is 15x10 but the image 30x20"),
        (line(mask="black.png"), "no pixel"),
        (line(mask="nowhere.png"), "no such image"),
        (line(mask={"size": [H, W]}), "unreadable segmentation"),
        (line(mask={"size": [10, 15], "counts": [150]}), "the mask is 15x10"),
        (line(mask={"size": [H, W], "counts": [H * W]}), "no pixel"),
        (line(mask={"size": [H, W], "counts": "!!"}), "the run-length text is damaged"),
        (line(mask={"size": [H, W], "counts": [5, 10**6]}), "unreadable segmentation"),
        (line(image="nowhere.png"), "no image nowhere.png"),
        (line(image="empty.png"), "empty"),
        (line(image="corrupt.png"), "not a readable image"),
        (line(image="large.png"), "1600 pixels, more than 1000"),
    ],
)
def test_a_bad_line_is_named(folder: Path, bad: dict | str, says: str) -> None:
    path = write_lines(folder, line(), "", bad)
    with pytest.raises(DataError, match=says) as caught:
        load(config(path, max_pixels=1000), "train")
    message = str(caught.value)
    assert "\n" not in message
    assert f"{path}:3" in message or ".png:" in message


# ---------------------------------------------------------------- COCO


def document() -> dict[str, Any]:
    polygon = [5, 5, 15, 5, 15, 10, 5, 10]
    return {
        "images": [{"id": 1, "file_name": "a.png", "height": H, "width": W}],
        "categories": [{"id": 3, "name": "car"}],
        "annotations": [
            {
                "id": 11,
                "image_id": 1,
                "category_id": 3,
                "bbox": [5, 5, 10, 5],
                "segmentation": [polygon],
                "point": [6, 6],
            },
            {
                "id": 12,
                "image_id": 1,
                "category_id": 3,
                "segmentation": {"size": [H, W], "counts": [0, 60, H * W - 60]},
            },
            {"id": 13, "image_id": 1, "bbox": [0, 0, 2, 2]},
        ],
        "expressions": [
            {"id": "a", "image_id": 1, "question": "both cars", "annotation_ids": [11, 12]},
            {"id": "b", "image_id": 1, "question": "the bus", "annotation_ids": []},
            {"id": "c", "image_id": 1, "question": "how many", "task": "count", "annotation_ids": [13]},
        ],
    }


def write_json(folder: Path, content: Any) -> Path:
    path = folder / "annotations.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_coco_with_expressions(folder: Path) -> None:
    both, bus, count = load(config(write_json(folder, document())), "eval")
    assert (both.id, both.question, both.task, both.target.labels) == ("a", "both cars", "segment", ("car", "car"))
    assert both.target.boxes.tolist() == [[5, 5, 15, 10], [0, 0, 3, H]]  # the second from its three columns
    assert both.target.points[0].tolist() == [6, 6]
    assert both.target.points[1][0] == 1
    assert masks.decode(both.target.masks[0])[5:10, 5:15].all()
    assert (masks.decode(both.target.masks[1]) == rectangle(0, 0, 3, H, H, W)).all()
    assert (bus.target.count, bus.target.masks) == (0, ())
    assert (count.target.boxes.tolist(), count.target.masks, count.target.labels) == ([[0, 0, 2, 2]], (), ())


def test_images_may_lie_in_a_folder_beside(folder: Path) -> None:
    (folder / "images").mkdir()
    (folder / "a.png").rename(folder / "images" / "a.png")
    path = write_json(folder, document())
    assert next(coco.read(path, Images(path, 1000))).image_path == str(folder / "images" / "a.png")


def change(*keys: str | int, to: Any) -> Callable[[dict], Any]:
    def edit(content: Any) -> Any:
        place = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to
        return content

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda _: "{", "not one JSON object"),
        (lambda _: [], "record: "),
        (lambda content: {k: v for k, v in content.items() if k != "expressions"}, "expressions: Field required"),
        (change("expressions", to=[]), "the data set is empty"),
        (change("expressions", 1, "id", to="a"), "two expression entries have id a"),
        (change("annotations", 1, "id", to=11), "two annotation entries have id 11"),
        (change("expressions", 1, "image_id", to=9), "expression b: no image has id 9"),
        (change("expressions", 0, "annotation_ids", to=[99]), "expression a: image 1 has no annotation 99"),
        (change("expressions", 0, "annotation_ids", to=[11, 13]), "expression a: 1 of 2 objects have a mask"),
        (change("images", 0, "file_name", to="b.png"), "no image b.png"),
        (change("images", 0, "file_name", to="large.png"), "more than 1000"),
        (change("images", 0, "height", to=21), "is 30x20 but the JSON says 30x21"),
        (change("annotations", 0, "segmentation", to=[[1, 2, "x", 4, 5, 6]]), "annotation 11: unreadable segmentation"),
        (
            change("annotations", 0, "segmentation", to=[[1e9, 2, 3, 4, 5, 6]]),
            "annotation 11: .*far outside",
        ),
        (change("annotations", 0, "segmentation", to=[[float("nan"), 2, 3, 4, 5, 6]]), "a polygon lies far outside"),
        (change("annotations", 0, "segmentation", to=[40, 40, 50]), "annotation 11: "),
        (change("annotations", 0, "bbox", to=[25, 5, 10, 5]), "leaves the 30x20 image"),
        (change("annotations", 0, "bbox", to=[5, 5, 0, 5]), "is empty"),
        (change("annotations", 2, "bbox", to=None), "neither box nor mask"),
    ],
)
def test_a_bad_coco_file_is_named(folder: Path, edit: Callable[[dict], Any], says: str) -> None:
    path = write_json(folder, edit(document()))
    with pytest.raises(DataError, match=says) as caught:
        load(config(path, max_pixels=1000), "train")
    assert "\n" not in str(caught.value)


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


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json: no such file"):
        load(config(tmp_path / "nowhere.json"), "train")
    with pytest.raises(DataError, match="cannot be read"):
        load(DataConfig(format="coco", train=str(tmp_path), eval=""), "train")
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        load(config(tmp_path / "latin.jsonl"), "train")


def test_a_cut_image_is_found_by_decoding(folder: Path) -> None:
    with pytest.raises(DataError, match=r"cut\.png: the image is damaged"):
        load(config(write_lines(folder, line(), line(image="cut.png"))), "train")


def test_held_out_samples_are_the_first_ones(folder: Path) -> None:
    path = write_lines(folder, line(), line(), line())
    assert [found.id for found in load(config(path, eval_samples=2), "eval")] == ["mine:1", "mine:2"]
    assert len(load(config(path, eval_samples=2), "train")) == 3
    other = write_lines(folder, line(id="other")).rename(folder / "other.jsonl")
    path = write_lines(folder, line())
    assert [found.id for found in load(config(path), "eval", str(other))] == ["other"]


def test_an_id_that_stands_twice_is_named(folder: Path) -> None:
    path = write_lines(folder, line(id="twice"), line(id="once"), line(id="twice"))
    with pytest.raises(DataError, match=r"mine\.jsonl: two samples have the id 'twice'; make ids unique"):
        load(config(path), "train")


# ---------------------------------------------------------------- readers by name, with options


def test_a_reader_takes_the_options_of_its_signature(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Path, int, str]] = []

    def read(path: Path, images: Images, /, *, every: int = 1, split: str) -> Iterator[Sample]:
        seen.append((path, every, split))
        found, height, width = images.find("a.png", "here")
        yield builders.sample("mine", image_path=str(found), height=height, width=width)

    monkeypatch.setitem(READERS._entries, "mine", read)
    settings = config(folder / "x.jsonl", format="mine", options={"split": "val", "every": 3})
    (found,) = load(settings, "train")
    assert (found.id, found.height, found.width) == ("mine", H, W)
    assert seen == [(folder / "x.jsonl", 3, "val")]
    for options, said in (
        (
            {"split": "val", "evry": 3},
            r"data\.options: unknown key 'evry'; did you mean 'every'\? \(known: every, split\)",
        ),
        ({"split": "val", "every": "three"}, r"data\.options\.every='three': Input should be a valid integer"),
        ({"every": 3}, r"data\.options: 'split' is missing; it has no default"),
    ):
        with pytest.raises(UserError, match=said):
            load(config(folder / "x.jsonl", format="mine", options=options), "train")


def test_an_unknown_format_or_option_is_named(folder: Path) -> None:
    path = write_lines(folder, line())
    with pytest.raises(UserError, match=r"no data format 'cocoo'; did you mean 'coco'\? \(known: coco, jsonl\)"):
        load(config(path, format="cocoo"), "train")
    with pytest.raises(UserError, match=r"data\.options: unknown key 'split'; there are none"):
        load(config(path, options={"split": "val"}), "train")
