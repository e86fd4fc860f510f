"""Guards the readers of what annotation tools write: small sets in their layout, quirks included, read as drawn.

Expectations are worked out by hand. Images are 20 high and 30 wide unless a name says otherwise.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from perception import images, masks
from perception.config import DataConfig
from perception.datasets import Dataset, load
from perception.errors import DataError
from perception.types import Sample
from tests.builders import noise, png, rectangle

H, W = 20, 30


@pytest.fixture(autouse=True)
def picture(tmp_path: Path) -> bytes:
    data = png(noise(0, H, W))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(data)
    return data


def read(format_: str, path: Path, **options: Any) -> Dataset:
    return load(DataConfig(format=format_, train="", eval="", options=options), str(path))


def asked(data: Sequence[Sample]) -> dict[str, Sample]:
    """Samples by their question; every question once."""
    found = {sample.question: sample for sample in data}
    assert len(found) == len(data)
    return found


def drawn(sample: Sample, *expected: np.ndarray) -> None:
    """The masks of a sample, exactly."""
    assert len(sample.target.masks) == len(expected)
    for mask, pixels in zip(sample.target.masks, expected, strict=True):
        np.testing.assert_array_equal(masks.decode(mask), pixels)


SQUARE = rectangle(5, 5, 15, 10, H, W)
"""The pixels inside the polygon (5, 5) (15, 5) (15, 10) (5, 10)."""
CORNERS = [[5, 5], [15, 5], [15, 10], [5, 10]]


def disc(x: float, y: float, radius: float) -> np.ndarray:
    """Pixels whose centre lies in a circle."""
    rows, columns = np.mgrid[:H, :W] + 0.5
    return np.hypot(columns - x, rows - y) <= radius


# ---------------------------------------------------------------- labelme


def labelme(folder: Path, name: str, *shapes: dict[str, Any], **changes: Any) -> Path:
    each = [{"group_id": None, "description": "", "flags": {}, "mask": None} | shape for shape in shapes]
    content = {"version": "5.4.1", "flags": {}, "shapes": each, "imagePath": "..\\images\\a.png", "imageData": None}
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content | {"imageHeight": H, "imageWidth": W} | changes), encoding="utf-8-sig")
    return path


def shape(label: str, kind: str, points: Any, **changes: Any) -> dict[str, Any]:
    return {"label": label, "shape_type": kind, "points": points} | changes


def test_labelme(tmp_path: Path) -> None:
    crop = np.array([[0, 1, 1], [1, 1, 0]], np.uint8) * 255
    encoded = base64.b64encode(png(crop)).decode()
    labelme(
        tmp_path,
        "marks/a.json",
        shape("car", "polygon", CORNERS),
        shape("car", "polygon", [[20, 0], [22, 0], [22, 2], [20, 2]], group_id=3),
        shape("car", "polygon", [[24, 0], [26, 0], [26, 2], [24, 2]], group_id=3),
        shape("box", "rectangle", [[15, 10], [5, 5]]),
        shape("disc", "circle", [[15, 10], [15, 4]]),
        shape("dot", "point", [[3, 4]]),
        shape("dot", "point", [[6, 7]]),
        shape("grown", "mask", [[4, 6], [6, 7]], mask=encoded),
        shape("mixed", "polygon", CORNERS),
        shape("mixed", "rectangle", [[0, 0], [4, 4]]),
    )
    found = asked(read("labelme", tmp_path / "marks", task="count"))
    assert list(found) == ["car", "box", "disc", "dot", "grown", "mixed"]
    assert {sample.task for sample in found.values()} == {"count"}
    assert found["car"].id == "a.json:car" and Path(found["car"].image.path).samefile(tmp_path / "images" / "a.png")
    two = rectangle(20, 0, 22, 2, H, W) | rectangle(24, 0, 26, 2, H, W)
    drawn(found["car"], SQUARE, two)
    assert found["car"].target.boxes.tolist() == [[5, 5, 15, 10], [20, 0, 26, 2]]
    assert found["box"].target.boxes.tolist() == [[5, 5, 15, 10]] and found["box"].target.masks == ()
    circle = masks.decode(found["disc"].target.masks[0])
    assert (circle != disc(15, 10, 6)).sum() <= 4 and circle[10, 15] and not circle[10, 22]
    assert found["dot"].target.points.tolist() == [[3, 4], [6, 7]]
    assert found["dot"].target.known == {"points", "count", "labels"} and found["dot"].target.count == 2
    expected = np.zeros((H, W), bool)
    expected[6:8, 4:7] = crop > 0
    drawn(found["grown"], expected)
    assert found["mixed"].target.boxes.tolist() == [[5, 5, 15, 10], [0, 0, 4, 4]] and not found["mixed"].target.masks


def test_labelme_numbers_objects_in_their_labels_only_if_told(tmp_path: Path) -> None:
    boxes = [[[0, 0], [4, 4]], [[6, 0], [9, 4]], [[12, 0], [14, 4]]]
    labels = ("person-1", "person-2", "covid-19")
    labelme(tmp_path, "marks/a.json", *(shape(name, "rectangle", box) for name, box in zip(labels, boxes, strict=True)))
    assert list(asked(read("labelme", tmp_path / "marks"))) == list(labels)
    found = asked(read("labelme", tmp_path / "marks", numbered=True))
    assert {name: sample.target.count for name, sample in found.items()} == {"person": 2, "covid": 1}


def test_labelme_keeps_the_image_inside_where_its_file_is_missing(tmp_path: Path, picture: bytes) -> None:
    inside = base64.b64encode(picture).decode()
    path = labelme(tmp_path, "b.json", shape("a", "point", [[1, 1]]), imagePath="C:\\x\\gone.png", imageData=inside)
    (sample,) = read("labelme", path)
    assert sample.image.data == picture and (sample.height, sample.width) == (H, W)
    assert images.decode(images.read(sample.image)).shape == (H, W, 3)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (shape("a", "line", [[0, 0], [9, 9]]), "a line has no area"),
        (shape("a", "polygon", [[0, 0], [9, 9]]), "unreadable segmentation"),
        (shape("a", "rectangle", [[0, 0], [40, 9]]), "leaves the 30x20 image"),
        (shape("a", "point", [[31.6, 2]]), "leaves the 30x20 image"),
        (shape("a", "rectangle", [[4, 4], [4, 4]]), "is empty"),
        (shape("a", "mask", [[0, 0]], mask="?"), "the mask cannot be read"),
        (
            shape("a", "mask", [[28, 0]], mask=base64.b64encode(png(np.ones((3, 3), np.uint8))).decode()),
            "leaves the image",
        ),
        (
            shape("a", "mask", [[0, 0]], mask=base64.b64encode(png(np.zeros((3, 3), np.uint8))).decode()),
            "no pixel is set",
        ),
        ({"label": "a", "points": [[1]], "shape_type": "point"}, "the annotation cannot be read"),
        ({"label": "a"}, "the annotation cannot be read"),
    ],
)
def test_a_bad_shape_is_one_bad_record(tmp_path: Path, bad: dict[str, Any], says: str) -> None:
    labelme(tmp_path, "marks/a.json", bad)
    labelme(tmp_path, "marks/b.json", shape("b", "rectangle", [[0, 0], [4, 4]]))
    (tmp_path / "marks" / "c.json").write_text("{")
    data = read("labelme", tmp_path / "marks")
    assert len(data) == 3 and data[1].question == "b"
    for index, said in ((0, says), (2, "c.json: not valid JSON")):
        with pytest.raises(DataError, match=said) as caught:
            _ = data[index]
        assert "\n" not in str(caught.value) and ".json" in str(caught.value)


# ---------------------------------------------------------------- CVAT

CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version><meta><task><labels><label><name>car</name></label></labels></task></meta>
  <image id="0" name="sub/a.png" width="30" height="20">
    <box label="car" source="manual" occluded="0" xtl="5.00" ytl="5.00" xbr="15.00" ybr="10.00" z_order="0"></box>
    <box label="tilted" occluded="0" xtl="7.00" ytl="3.00" xbr="11.00" ybr="13.00" rotation="90.0" z_order="0"></box>
    <polygon label="tree" occluded="0" points="5.00,5.00;15.00,5.00;15.00,10.00;5.00,10.00" z_order="0"></polygon>
    <points label="head" occluded="0" points="3.00,4.00;6.00,7.00" z_order="0"></points>
    <points label="head" occluded="0" points="8.50,9.00" z_order="0"></points>
    <mask label="stain" occluded="0" rle="1, 2, 1, 2, 5, 1" left="2" top="6" width="4" height="3" z_order="0"></mask>
    <ellipse label="plate" occluded="0" cx="15.00" cy="10.00" rx="6.00" ry="6.00" z_order="0"></ellipse>
    <polyline label="lane" occluded="0" points="1.00,1.00;9.00,9.00" z_order="0"></polyline>
    <box label="pair" group_id="1" xtl="0" ytl="0" xbr="2" ybr="2"/>
    <box label="pair" group_id="1" xtl="6" ytl="6" xbr="9" ybr="8"/>
    <tag label="sunny" source="manual"></tag>
  </image>
  <image id="1" name="sub/empty.png" width="30" height="20"></image>
</annotations>"""


def test_cvat(tmp_path: Path, picture: bytes) -> None:
    (tmp_path / "images" / "sub").mkdir()
    (tmp_path / "images" / "sub" / "a.png").write_bytes(picture)
    (tmp_path / "annotations.xml").write_text(CVAT)
    data = read("cvat", tmp_path)
    assert [record.question for record in data.records] == [
        "car", "tilted", "tree", "head", "stain", "plate", "lane", "pair"
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"sub/a\.png, lane: a polyline has no area"):
        _ = data[6]
    found = asked([data[index] for index in (0, 1, 2, 3, 4, 5, 7)])
    assert found["car"].target.boxes.tolist() == [[5, 5, 15, 10]] and not found["car"].target.masks
    drawn(found["tilted"], rectangle(4, 6, 14, 10, H, W))  # 4 x 10 around (9, 8), turned by a right angle
    drawn(found["tree"], SQUARE)
    assert found["head"].target.points.tolist() == [[3, 4], [6, 7], [8.5, 9]] and len(found["head"].target.boxes) == 0
    window = np.zeros((H, W), bool)
    window[6:9, 2:6] = [[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]]
    drawn(found["stain"], window)
    assert found["stain"].target.boxes.tolist() == [[2, 6, 6, 9]]
    assert (masks.decode(found["plate"].target.masks[0]) != disc(15, 10, 6)).sum() <= 4
    assert found["pair"].target.boxes.tolist() == [[0, 0, 9, 8]]


@pytest.mark.parametrize("rle", ["1, 2, 1, 2, 5, 2", "1, 2", "-1, 13", "", "a"])
def test_a_damaged_cvat_mask_is_one_bad_record(tmp_path: Path, rle: str) -> None:
    (tmp_path / "annotations.xml").write_text(CVAT.replace("1, 2, 1, 2, 5, 1", rle).replace("sub/a.png", "a.png"))
    data = read("cvat", tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        _ = data[4 if len(data) > 1 else 0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("format_", ["cvat", "voc"])
def test_hostile_xml_does_not_expand(tmp_path: Path, format_: str, encoding: str) -> None:
    lol = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    head = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE l [<!ENTITY l0 "lol">{lol}]>'
    evil = f"{head}<annotations>&l9;</annotations>"
    (tmp_path / "annotations.xml").write_bytes(evil.encode(encoding))
    with pytest.raises(DataError, match="not valid XML"):
        _ = read(format_, tmp_path)[0]


def test_a_cvat_file_of_a_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "annotations.xml").write_text("<annotations><track id='0' label='car'/></annotations>")
    with pytest.raises(DataError, match="export the task in that format"):
        read("cvat", tmp_path)


# ---------------------------------------------------------------- YOLO


def yolo(folder: Path, rows: str | None, **changes: Any) -> Path:
    for name in ("images/train", "labels/train"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "images" / "a.png").rename(folder / "images" / "train" / "a.png")
    if rows is not None:
        (folder / "labels" / "train" / "a.txt").write_bytes(rows.encode())
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump({"train": "images/train", "nc": 3, "names": ["cat", "dog", 7]} | changes))
    return path


def test_yolo(tmp_path: Path) -> None:
    rows = (
        "# by hand\r\n\r\n0 0.5 0.5 0.2 0.1\r\n"  # 6 x 2 around (15, 10)
        "0 0.1 0.5 0.201 1\n"  # leaves the image by .0005 of its width
        "1 0.2 0.25 0.5 0.25 0.5 0.5 0.2 0.5\n"  # an oriented box, as a segment: (6, 5) to (15, 10)
        "2 0.2 0.25 0.5 0.25 0.5 0.5 0.35 0.5 0.2 0.5  # five corners"
    )
    found = asked(read("yolo", yolo(tmp_path, rows)))
    assert list(found) == ["cat", "dog", "7"]
    np.testing.assert_allclose(found["cat"].target.boxes, [[12, 9, 18, 11], [0, 0, 6.015, 20]], atol=1e-5)
    for name in ("dog", "7"):
        drawn(found[name], rectangle(6, 5, 15, 10, H, W))
    assert found["dog"].id == "images/train/a.png:dog"


@pytest.mark.parametrize("rows", [None, "", "# nothing\r\n"])
def test_a_yolo_image_without_labels_is_asked_about_only_if_wanted(tmp_path: Path, rows: str | None) -> None:
    path = yolo(tmp_path, rows, names={0: "cat", 2: "dog"})
    with pytest.raises(DataError, match="the data set is empty"):
        read("yolo", path)
    for wanted, count in ((1, 1), (2, 2), (9, 2)):
        once, again = (read("yolo", path, absent=wanted) for _ in range(2))
        assert [sample.question for sample in once] == [sample.question for sample in again]
        assert len(asked(once)) == count and {sample.target.count for sample in once} == {0}


def test_absent_yolo_classes_are_those_that_the_image_lacks(tmp_path: Path) -> None:
    found = asked(read("yolo", yolo(tmp_path, "1 0.5 0.5 0.2 0.1"), absent=9))
    assert {name: sample.target.count for name, sample in found.items()} == {"dog": 1, "cat": 0, "7": 0}


@pytest.mark.parametrize("changes", [{"train": "../train/images"}, {"path": "/nowhere", "train": ["train/images"]}])
def test_yolo_paths_as_roboflow_and_other_machines_write_them(tmp_path: Path, picture: bytes, changes: Any) -> None:
    for split in ("train", "valid"):
        for name in ("images", "labels"):
            (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / "images" / f"{split}_jpg.rf.ab12.png").write_bytes(picture)
        (tmp_path / split / "labels" / f"{split}_jpg.rf.ab12.txt").write_text("0 0.5 0.5 0.2 0.1")
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump({"names": ["cat"], "val": "../valid/images"} | changes))
    for data, split in (
        (read("yolo", path), "train"),
        (read("yolo", tmp_path), "train"),
        (read("yolo", path, split="val"), "valid"),
        (read("yolo", tmp_path / "valid" / "images"), "valid"),
    ):
        assert [record.place for record in data.records] == [f"image {split}/images/{split}_jpg.rf.ab12.png, cat"]
        assert data[0].target.count == 1
    with pytest.raises(DataError, match="no image of test in it"):
        read("yolo", path, split="test")


def test_yolo_poses_give_their_box(tmp_path: Path) -> None:
    (sample,) = read("yolo", yolo(tmp_path, "0 0.5 0.5 0.2 0.1 0.45 0.5 2 0 0 0", kpt_shape=[2, 3]))
    np.testing.assert_allclose(sample.target.boxes, [[12, 9, 18, 11]], atol=1e-5)


@pytest.mark.parametrize(
    "row", ["3 0.5 0.5 0.2 0.1", "x 0.5 0.5 0.2 0.1", "0 0.5 0.5 0.2", "0 15 10 6 2", "0 0.5 nan 0.2 0.1"]
)
def test_a_bad_yolo_row_is_one_bad_record(tmp_path: Path, row: str) -> None:
    data = read("yolo", yolo(tmp_path, f"1 0.5 0.5 0.2 0.1\n{row}\n"))
    with pytest.raises(DataError, match=r"a\.txt:2: .*mend the row"):
        _ = data[0]


# ---------------------------------------------------------------- Pascal VOC

VOC = """<annotation><folder>VOC2007</folder><filename>a.png</filename>
<size><width>30</width><height>20</height><depth>3</depth></size>
<object><name>dog</name><pose>Left</pose><truncated>1</truncated><difficult>0</difficult>
<bndbox><xmin>6</xmin><ymin>6</ymin><xmax>15</xmax><ymax>10</ymax></bndbox>
<part><name>head</name><bndbox><xmin>7</xmin><ymin>7</ymin><xmax>8</xmax><ymax>8</ymax></bndbox></part></object>
<object><name>dog</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object>
<object><name>cat</name><bndbox><xmin>2.5</xmin><ymin>0</ymin><xmax>4</xmax><ymax>2</ymax></bndbox></object>
</annotation>"""


@pytest.mark.parametrize("official", [True, False])
def test_voc(tmp_path: Path, picture: bytes, official: bool) -> None:
    """Boxes count from 1 and include their last pixel; a box from 0, as other tools write it, is clipped."""
    folder = tmp_path / "Annotations" if official else tmp_path
    for one in (folder, tmp_path / "JPEGImages", tmp_path / "ImageSets" / "Main") if official else ():
        one.mkdir(parents=True, exist_ok=True)
    (tmp_path / ("JPEGImages" if official else "") / "a.png").write_bytes(picture)
    for name in ("a", "b"):
        (folder / f"{name}.xml").write_text(VOC)
    assert len(read("voc", tmp_path)) == len(read("voc", folder)) == 4
    if official:
        (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a  1\n")
    found = asked(read("voc", tmp_path, split="train") if official else read("voc", tmp_path)[:2])
    assert found["dog"].target.boxes.tolist() == [[5, 5, 15, 10], [0, 0, 30, 20]]
    assert found["cat"].target.boxes.tolist() == [[1.5, 0, 4, 2]]
    (folder / "a.xml").write_text(VOC.replace("<width>30", "<width>20").replace("<height>20", "<height>30"))
    with pytest.raises(DataError, match="30x20 but the annotations say 20x30"):
        _ = read("voc", tmp_path)[0]
