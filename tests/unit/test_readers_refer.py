"""Guards the readers of referring expressions: sets written here in the published layouts, truth worked out by hand."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from pycocotools import mask as coco

from perception import masks
from perception.errors import DataError, UserError
from perception.images import read
from tests.builders import dataset, noise, png, rectangle

H, W = 20, 30
POLYGON = [5.0, 5.0, 15.0, 5.0, 15.0, 10.0, 5.0, 10.0]
CUP = {"bbox_2d": [84, 210, 251, 402], "point_2d": [160, 300]}
PLATE = {"bbox_2d": [60, 380, 840, 500], "point_2d": [450, 452]}
SOLUTION = json.dumps([CUP, PLATE])


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(
    path: Path, split: str, form: str, column: str = "image", side: tuple[int, int] = (H, W), **columns: Any
) -> Path:
    """Columns beside one of pictures, saved as the hub does (parquet) or by `save_to_disk`."""
    count = len(next(iter(columns.values())))
    pictures = [{"bytes": png(noise(i, *side)), "path": None} for i in range(count)]
    kind: Any = datasets.Image()
    if column == "images":
        pictures, kind = [[one] for one in pictures], datasets.List(kind)  # type: ignore[misc]
    made = datasets.Dataset.from_dict(columns | {column: pictures}).cast_column(column, kind)
    if form == "parquet":
        path.mkdir()
        made.to_parquet(path / f"{split}-00000-of-00001.parquet")
    else:
        datasets.DatasetDict({split: made}).save_to_disk(path)
    return path


# ---------------------------------------------------------------- Seg-Zero, VisionReasoner


@pytest.mark.parametrize("form", ["parquet", "saved"])
@pytest.mark.parametrize("names", [("image", "solution"), ("images", "answer")])
def test_training_tables(tmp_path: Path, form: str, names: tuple[str, str]) -> None:
    picture, answer = names
    sizes = {"img_height": [480], "img_width": [640]}  # of the picture before it was squeezed
    columns = {"id": ["refcocog_17_23"], "problem": ["'left cup' and 'plate'"], answer: [SOLUTION], **sizes}
    path = table(tmp_path / "multi_object_840", "train", form, picture, (840, 840), **columns)
    (one,) = dataset(path, "vision_reasoner")
    assert (one.question, one.task, one.height, one.width) == ("'left cup' and 'plate'", "segment", 840, 840)
    # the last column and row are inside; 841 is cut at the edge
    assert one.target.boxes.tolist() == [[84, 210, 252, 403], [60, 380, 840, 501]]
    assert one.target.points.tolist() == [[160, 300], [450, 452]]
    assert one.target.known == {"boxes", "points", "count"}
    assert read(one.image) == png(noise(0, 840, 840))


def test_older_training_tables_hold_one_object_and_two_points(tmp_path: Path) -> None:
    old = ["<box>(84,210),(251,402)</box><points>(160,300),(140,251)</points>", "<box>(84,210),(251,402)</box>", "[]"]
    path = table(tmp_path / "refCOCOg_9k_840", "train", "saved", side=(840, 840), problem=["a"] * 3, solution=old)
    data = dataset(path, "vision_reasoner", options={"task": "ground"})
    assert data[0].target.boxes.tolist() == [[84, 210, 252, 403]]
    assert data[0].target.points.tolist() == [[160, 300]]
    with pytest.raises(DataError, match=r"row 1: not valid JSON"):
        data[1]
    assert (data[2].target.count, data[2].task) == (0, "ground")


def test_evaluation_tables_with_masks(tmp_path: Path) -> None:
    shape, nothing = rectangle(5, 5, 15, 10, H, W), np.zeros((H, W), bool)
    ragged = [[True] * W] * (H - 1) + [[True]]
    rows = [shape.tolist(), nothing.tolist(), ragged, shape[:-1].tolist()]
    columns = {"text": list("abcd"), "mask": rows, "bbox": [[5, 5, 15, 10], [], [], []], "img_height": [H] * 4}
    data = dataset(table(tmp_path / "refcoco_testA", "test", "parquet", **columns), "vision_reasoner")
    assert [record.question for record in data.records] == list("abcd")
    assert data[0].target.boxes.tolist() == [[5, 5, 15, 10]]
    assert (masks.decode(data[0].target.masks[0]) == shape).all()
    assert data[1].target.count == 0 and "masks" in data[1].target.known
    for bad, said in ((2, "the mask is .* but the image 30x20"), (3, "the mask is 30x19 but the image 30x20")):
        with pytest.raises(DataError, match=rf"row {bad}: {said}") as raised:
            data[bad]
        assert raised.value.reason == "mask"


def test_masks_are_read_when_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "ReasonSeg_val", "test", "saved", text=["a"], mask=[[[True] * W] * H])
    monkeypatch.setattr(masks, "encode", lambda mask: pytest.fail("a mask was read"))
    assert len(dataset(path, "vision_reasoner")) == 1


def test_evaluation_tables_with_boxes_or_a_count_alone(tmp_path: Path) -> None:
    boxes = [[[5, 5, 15, 10], [0, 0, 2, 3]]]
    columns = {"text": ["car"], "image_id": ["7"], "ann_id": ["7"], "cat_id": ["3"], "bbox": boxes}
    (one,) = dataset(table(tmp_path / "coco_val", "test", "parquet", **columns), "vision_reasoner")
    assert one.target.boxes.tolist() == boxes[0] and one.target.count == 2
    flat = table(tmp_path / "flat", "test", "saved", text=["a", "b", "c"], bbox=[[5, 5, 15, 10], [1, 2, 3], []])
    data = dataset(flat, "vision_reasoner")
    assert data[0].target.boxes.tolist() == [[5, 5, 15, 10]] and data[2].target.count == 0
    with pytest.raises(DataError, match=r"row 1: Expected `array` of length 4"):
        data[1]
    path = table(tmp_path / "counting_countbench", "test", "parquet", text=["mugs", "cups", "?"], count=[5, 0, None])
    data = dataset(path, "vision_reasoner", options={"split": "test", "task": "count"})
    with pytest.raises(DataError, match=r"row 2: no text solution or answer, no mask, bbox or count"):
        data[2]
    five, none = data[:2]
    assert (five.target.count, five.target.known, five.task) == (5, {"count"}, "count")
    assert none.target.count == 0 and none.target.known >= {"count", "boxes", "masks"}


def test_a_table_of_other_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the columns problem, text, only caption, image"):
        dataset(table(tmp_path / "other", "train", "parquet", caption=["a"]), "vision_reasoner")
    data = dataset(table(tmp_path / "half", "train", "parquet", text=["a"]), "vision_reasoner")
    with pytest.raises(DataError, match=r"half: row 0: no text solution or answer, no mask, bbox or count"):
        data[0]


# ---------------------------------------------------------------- RefCOCO and gRefCOCO

NAME = "COCO_train2014_000000000007.jpg"


def ref(**changes: Any) -> dict[str, Any]:
    said = [
        {"tokens": ["man", text], "raw": f"Man, {text}", "sent": f"man {text}", "sent_id": i}
        for i, text in ((20, "left"), (21, "é"))
    ]
    plain = {"ref_id": 9, "ann_id": 55, "image_id": 7, "category_id": 1, "split": "testA", "sent_ids": [20, 21]}
    return plain | {"file_name": NAME.replace(".jpg", "_0.jpg"), "sentences": said} | changes


def refer(folder: Path, name: str, refs: list[dict[str, Any]], protocol: int = 2) -> Path:
    """A release of RefCOCO with the pictures in train2014 beside it."""
    (folder / "train2014").mkdir()
    (folder / "train2014" / NAME).write_bytes(png(noise(0, H, W)))
    annotations = [
        {"id": 55, "segmentation": [POLYGON], "iscrowd": 0, "area": 50.0},
        {
            "id": 56,
            "segmentation": {"size": [H, W], "counts": [0, 60, H * W - 60]},
            "iscrowd": 1,
            "bbox": [0.0, 0.0, 3.0, 20.0],
        },
        {"id": 57, "segmentation": [], "iscrowd": 0},
    ]
    box = {"image_id": 7, "category_id": 1, "bbox": [5.0, 5.0, 10.0, 5.0]}
    picture = {"id": 7, "file_name": NAME, "height": H, "width": W, "license": 1}
    content = {
        "images": [picture],
        "annotations": [box | one for one in annotations],
        "categories": [{"id": 1, "name": "person"}],
    }
    (folder / "refcoco").mkdir()
    (folder / "refcoco" / "instances.json").write_text(json.dumps(content))
    data = json.dumps(refs).encode() if name.endswith("json") else pickle.dumps(refs, protocol=protocol)
    (folder / "refcoco" / name).write_bytes(data)
    return folder / "refcoco" / name


def referred(path: Path, **options: Any) -> Any:
    return dataset(path, "ref_coco", images=str(path.parent.parent / "train2014"), options={"split": "testA"} | options)


@pytest.mark.parametrize("name", ["refs(unc).p", "refs(unc).json"])
@pytest.mark.parametrize("protocol", [0, 2])
def test_refcoco(tmp_path: Path, name: str, protocol: int) -> None:
    path = refer(tmp_path, name, [ref(), ref(ref_id=10, split="train")], protocol)
    left, accent = referred(path)
    assert [left.id, left.question, accent.question] == ["9:0", "man left", "man é"]
    assert left.image.path == str(tmp_path / "train2014" / NAME)
    assert left.target.boxes.tolist() == [[5, 5, 15, 10]]
    expected = coco.decode(coco.merge(coco.frPyObjects([POLYGON], H, W))).astype(bool)
    assert (masks.decode(left.target.masks[0]) == expected).all()
    assert [one.question for one in referred(path, texts="first")] == ["man left"]
    with pytest.raises(DataError, match=r"no split 'val'; set data.options.split to one of testA, train"):
        referred(path, split="val")
    with pytest.raises(UserError, match=r"data.options: 'split' is missing"):
        dataset(path, "ref_coco")


def test_text_of_python_2_is_read(tmp_path: Path) -> None:
    """`S'...'` is a byte string of protocol 0; \\xe9 is an e with an accent in Latin-1."""
    path = refer(tmp_path, "refs(google).p", [ref()], 0)
    spelled = pickle.dumps([ref()], protocol=0).replace(b"Vman left\n", b"S'man l\\xe9ft'\n")
    path.write_bytes(spelled)
    assert referred(path)[0].question == "man léft"


def test_an_empty_segmentation_leaves_the_box(tmp_path: Path) -> None:
    path = refer(tmp_path, "refs(unc).p", [ref(ann_id=57), ref(ref_id=3, ann_id=99), ref(ref_id=4, image_id=8)])
    data = referred(path, texts="first")
    assert data[0].target.masks == () and data[0].target.boxes.tolist() == [[5, 5, 15, 10]]
    with pytest.raises(DataError, match=r"image 7 has no annotation 99"):
        data[1]
    with pytest.raises(DataError, match=r"no image has id 8"):
        data[2]


@pytest.mark.parametrize("name", ["grefs(unc).json", "grefs(unc).p"])
def test_grefcoco_names_several_objects_or_none(tmp_path: Path, name: str) -> None:
    none = ref(ref_id=4, ann_id=[-1], category_id=[-1], no_target=True)
    path = refer(tmp_path, name, [ref(ann_id=[55, 56], category_id=[1, 1]), none])
    several, nothing = referred(path, texts="first")
    assert several.target.count == 2
    whole = masks.decode(masks.union(several.target.masks, H, W))
    assert (whole == rectangle(5, 5, 15, 10, H, W) | rectangle(0, 0, 3, H, H, W)).all()
    assert nothing.target.count == 0 and nothing.target.complete


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_runs_a_command_is_refused(tmp_path: Path, protocol: int) -> None:
    path, mark = refer(tmp_path, "refs(unc).p", []), tmp_path / "run"
    path.write_bytes(pickle.dumps([ref(ann_id=Hostile(mark))], protocol=protocol))
    with pytest.raises(DataError, match=rf"{os.system.__module__}\.system") as raised:
        referred(path)
    assert not mark.exists() and "\n" not in str(raised.value)


@pytest.mark.parametrize("call", ["builtins\neval", "builtins\ngetattr", "copyreg\n_reconstructor", "numpy\nload"])
def test_a_pickle_calls_nothing_at_all(tmp_path: Path, call: str) -> None:
    path = refer(tmp_path, "refs(unc).p", [])
    path.write_bytes(f"c{call}\n(S'1'\ntR.".encode())
    with pytest.raises(DataError, match=r"it calls"):
        referred(path)


@pytest.mark.parametrize("data", [b"", b"\x80", b"(lp0\nI1", b"not a pickle", b"\x80\x04K\x07.", b"(lp0\ng0\na."])
def test_a_damaged_pickle_is_one_line(tmp_path: Path, data: bytes) -> None:
    path = refer(tmp_path, "refs(unc).p", [])
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"refs\(unc\)\.p: ") as raised:
        referred(path)
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------- RefCOCO as others published it


def test_lmms_lab(tmp_path: Path) -> None:
    polygons = [POLYGON, []]
    columns = {"question_id": ["0", "1"], "question": ["Describe it."] * 2, "answer": [["man left", "him"], ["her"]]}
    columns |= {
        "segmentation": polygons,
        "bbox": [[5.0, 5.0, 10.0, 5.0]] * 2,
        "iscrowd": [0, 0],
        "file_name": [NAME] * 2,
    }
    path = table(tmp_path / "RefCOCO", "testA", "parquet", **columns)
    man, him, her = dataset(path, "ref_coco_tables", options={"split": "testA"})
    assert [man.question, him.question, her.question] == ["man left", "him", "her"]
    assert (masks.decode(man.target.masks[0]) == rectangle(5, 5, 15, 10, H, W)).all()
    assert her.target.boxes.tolist() == [[5, 5, 15, 10]] and her.target.masks == ()
    assert read(her.image) == png(noise(1, H, W))
    assert len(dataset(path, "ref_coco_tables", options={"texts": "first"})) == 2


def test_jxu124(tmp_path: Path) -> None:
    raw = {"segmentation": [POLYGON], "bbox": [5.0, 5.0, 10.0, 5.0], "id": 55, "iscrowd": 0}
    said = [
        {"raw": "Man", "sent": "man", "sent_id": 1, "tokens": ["man"]},
        {"raw": "", "sent": "him", "sent_id": 2, "tokens": []},
    ]
    row = {
        "sentences": said,
        "raw_anns": json.dumps(raw),
        "image_path": f"coco/train2014/{NAME}",
        "bbox": [5.0, 5.0, 15.0, 10.0],
    }
    datasets.Dataset.from_list([row, row | {"raw_anns": "{}"}]).to_parquet(tmp_path / "validation.parquet")
    (tmp_path / "coco" / "train2014").mkdir(parents=True)
    (tmp_path / "coco" / "train2014" / NAME).write_bytes(png(noise(0, H, W)))
    data = dataset(tmp_path / "validation.parquet", "ref_coco_tables", images=str(tmp_path))
    assert [record.question for record in data.records] == ["man", "him"] * 2
    assert data[1].target.boxes.tolist() == [[5, 5, 15, 10]]
    assert (masks.decode(data[1].target.masks[0]) == rectangle(5, 5, 15, 10, H, W)).all()
    with pytest.raises(DataError, match=r"row 1: an object has neither box nor mask"):
        data[2]
    datasets.Dataset.from_list([{"caption": "man"}]).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"none of the columns answer, sentences, .*, only caption"):
        dataset(tmp_path / "other.parquet", "ref_coco_tables")


def test_perception_r1(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(png(noise(0, H, W)))
    row = {"image": NAME, "problem": "man left", "solution": [0.1, 0.25, 0.5, 0.75]}
    path = tmp_path / "refcoco_val.json"
    path.write_text(json.dumps([row | {"normalized_solution": [100, 250, 500, 750]}]))
    (one,) = dataset(path, "ref_coco_tables", options={"task": "ground"})
    assert one.target.boxes.tolist() == [[3, 5, 15, 15]]
    path.write_text(json.dumps([row]))
    with pytest.raises(DataError, match=r"refcoco_val.json: .*normalized_solution"):
        dataset(path, "ref_coco_tables")
