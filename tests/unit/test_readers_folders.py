"""Guards the readers of folders and pages: sets written here in the published layouts, truth by hand or by cv2."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from perception import masks
from perception.datasets.mask_folder import LAYOUTS
from perception.errors import DataError, UserError
from perception.types import Sample
from tests.builders import dataset, noise, png, rectangle

H, W = 20, 30


def jpeg(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def put(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def only_mask(sample: Sample) -> np.ndarray:
    (mask,) = sample.target.masks
    return masks.decode(mask)


# ---------------------------------------------------------------- ReasonSeg


def box(label: str, x1: float, y1: float, x2: float, y2: float) -> dict[str, Any]:
    points = [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]
    return {"label": label, "labels": [label], "shape_type": "polygon", "points": points, "group_id": None, "flags": {}}


def reason(
    folder: Path,
    name: str,
    *shapes: dict[str, Any],
    text: Sequence[str] = ("what one would hold",),
    encoding: str = "utf-8",
) -> Path:
    put(folder / f"{name}.jpg", jpeg(noise(0, H, W)))
    content = json.dumps({"text": text, "is_sentence": True, "shapes": shapes}, ensure_ascii=False)
    put(folder / f"{name}.json", content.encode(encoding))
    return folder


def reasoned(path: Path, ignore: str = "background", **options: Any) -> Any:
    return dataset(path, "reason_seg", options={"ignore": ignore} | options)


def test_the_outline_belongs_to_a_polygon(tmp_path: Path) -> None:
    """(1, 1)-(5, 4) is 5x4 pixels as LISA draws it, 4x3 as pycocotools does."""
    (one,) = reasoned(reason(tmp_path, "a", box("target", 1, 1, 5, 4)))
    assert (one.id, one.question, one.image.path) == ("a:0", "what one would hold", str(tmp_path / "a.jpg"))
    assert (only_mask(one) == rectangle(1, 1, 6, 5, H, W)).all()
    assert one.target.boxes.tolist() == [[1, 1, 6, 5]] and one.target.ignore is None


def test_corners_are_cut_to_whole_pixels(tmp_path: Path) -> None:
    (one,) = reasoned(reason(tmp_path, "a", box("target", 1.9, 1.99, 5.999, 4.5)))
    assert (only_mask(one) == rectangle(1, 1, 6, 5, H, W)).all()


LARGE, SMALL = rectangle(1, 1, 21, 16, H, W), rectangle(5, 5, 11, 11, H, W)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("large", "small", "ignore", "expected", "ignored"),
    [
        ("target", "ignore", "background", LARGE & ~SMALL, None),
        ("target", "ignore", "target", LARGE, None),
        ("target", "Ignored_part", "drop", LARGE & ~SMALL, SMALL),
        ("ignore", "target", "background", SMALL, None),
        ("ignore", "target", "target", LARGE, None),
        ("ignore", "target", "drop", SMALL, LARGE & ~SMALL),
        ("target", "flag", "drop", LARGE, np.zeros((H, W), bool)),
    ],
)
def test_smaller_regions_win_and_ignored_ones_are_a_choice(
    tmp_path: Path, order: int, large: str, small: str, ignore: str, expected: np.ndarray, ignored: np.ndarray | None
) -> None:
    shapes = [box(large, 1, 1, 20, 15), box(small, 5, 5, 10, 10)][::order]
    (one,) = reasoned(reason(tmp_path, "a", *shapes), ignore)
    assert (only_mask(one) == expected).all() and one.target.count == 1
    if ignored is None:
        assert one.target.ignore is None
    else:
        assert (masks.decode(one.target.ignore) == ignored).all()


def test_any_polygon_is_drawn_as_by_the_reference(tmp_path: Path) -> None:
    """Against LISA's steps written down independently: each value painted, largest area first."""
    random = np.random.default_rng(0)
    shapes = [
        {"label": label, "points": (random.random((random.integers(3, 8), 2)) * [W + 6, H + 6] - 3).tolist()}
        for label in ("target", "ignore", "target", "flag", "IGNORE", "target")
    ]
    painted = []
    for shape in shapes:
        corners, alone = np.array([shape["points"]], dtype=np.int32), np.zeros((H, W), np.uint8)
        cv2.polylines(alone, corners, True, 1, 1)
        cv2.fillPoly(alone, corners, 1)
        if shape["label"] != "flag":
            painted.append((int(alone.sum()), alone.astype(bool), "ignore" in shape["label"].lower()))
    expected = np.zeros((H, W), np.uint8)
    for _, where, ignored in sorted(painted, key=lambda one: -one[0]):
        expected[where] = 255 if ignored else 1
    (one,) = reasoned(reason(tmp_path, "a", *shapes), "drop")
    assert (only_mask(one) == (expected == 1)).all()
    assert (masks.decode(one.target.ignore) == (expected == 255)).all()


@pytest.mark.parametrize("far", [1e3, -2e9, 1e300])
def test_a_polygon_far_outside_is_refused_at_once(tmp_path: Path, far: float) -> None:
    with pytest.raises(DataError, match=r"a.json: a polygon lies far outside the 30x20 image"):
        reasoned(reason(tmp_path, "a", box("target", 1, 1, far, 4)))[0]


def test_the_choice_has_no_default(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.options: 'ignore' is missing"):
        dataset(reason(tmp_path, "a"), "reason_seg")
    with pytest.raises(UserError, match=r"data.options.ignore='keep'"):
        reasoned(tmp_path, "keep")


def test_files_without_a_target_in_cp1252_or_broken(tmp_path: Path) -> None:
    reason(tmp_path, "a", box("ignore", 1, 1, 5, 4), text=["the cafe\u0301", "another"])
    reason(tmp_path, "b", text=["the café’s sign"], encoding="cp1252")
    reason(tmp_path, "c")
    put(tmp_path / "c.json", '{"text": "no list", "shapes": []}')
    data = reasoned(tmp_path, texts="all")
    assert [one.question for one in data.records] == ["the cafe\u0301", "another", "the café’s sign", ""]
    assert data[0].target.count == 0 and data[0].target.masks == () and data[2].target.count == 0
    with pytest.raises(DataError, match=r"c.json: Expected `array`, got `str` - at `\$.text`"):
        data[3]
    with pytest.raises(DataError, match=r"no .json file there"):
        reasoned(tmp_path / "empty")


# ---------------------------------------------------------------- folders of masks

FOLDERS = {
    "cod10k_v3": ("COD10K-v3/Test", "Image", "GT_Object"),
    "camouflage": ("TestDataset/CAMO", "Imgs", "GT"),
    "camo": ("CAMO-V.1.0-CVIU2019/Images/Test", ".", "../../GT"),
    "duts": ("DUTS-TR", "DUTS-TR-Image", "DUTS-TR-Mask"),
    "dut_omron": ("DUT-OMRON", "DUT-OMRON-image", "pixelwiseGT-new-PNG"),
    "hku_is": ("HKU-IS", "imgs", "gt"),
    "ecssd": ("ECSSD", "images", "ground_truth_mask"),
    "dis5k": ("DIS5K/DIS-TE1", "im", "gt"),
}


def test_every_layout_is_tested() -> None:
    assert FOLDERS.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("layout", FOLDERS)
def test_published_folders(tmp_path: Path, layout: str) -> None:
    root, images, truths = FOLDERS[layout]
    root_path, suffix = tmp_path / root, ".png" if layout == "hku_is" else ".jpg"
    names = ["1#Accessories#1#Bag#2339506821", "COD10K-CAM-3-Flying-55-Butterfly-3330"]
    shapes = [rectangle(5, 5, 15, 10, H, W), rectangle(0, 0, 3, 4, H, W)]
    for name, shape in zip(names, shapes, strict=True):
        put(root_path / images / f"{name}{suffix}", (png if suffix == ".png" else jpeg)(noise(0, H, W)))
        put(root_path / truths / f"{name}.png", png(shape.astype(np.uint8) * 255))
    put(root_path / images / "Thumbs.db", b"")
    put(root_path / images / "._hidden.jpg", b"")
    put(root_path / truths / "of_another_split.png", b"")
    samples = list(dataset(root_path, "mask_folder", options={"layout": layout}))
    assert [one.id for one in samples] == names
    assert {one.question for one in samples} <= {"the camouflaged object", "the salient object", "the main object"}
    for one, shape in zip(samples, shapes, strict=True):
        assert (only_mask(one) == shape).all()
        assert Path(one.image.path).resolve() == (root_path / images / f"{one.id}{suffix}").resolve()


def folders(path: Path, **found: np.ndarray | None) -> Path:
    """Pictures of 30x20 in `rgb` and masks in `gt`, by name."""
    for name, mask in found.items():
        put(path / "rgb" / f"{name}.jpg", jpeg(noise(0, H, W)))
        if mask is not None:
            put(path / "gt" / f"{name}.png", png(mask.astype(np.uint8) * 255))
    return path


OWN = {"images": "rgb", "masks": "gt", "question": "the crack"}


def test_folders_of_ones_own_and_each_fault(tmp_path: Path) -> None:
    wide, far = rectangle(5, 5, 15, 10, H, W + 1), rectangle(5, 5, 15, 10, H, W + 2)
    nothing, whole = np.zeros((H, W), bool), rectangle(5, 5, 15, 10, H, W)
    path = folders(tmp_path, a=whole, b=None, c=nothing, d=wide, e=far)
    put(path / "gt" / "f.png", jpeg(whole.astype(np.uint8) * 255))  # JPEG bytes under the old name
    put(path / "rgb" / "f.jpg", jpeg(noise(0, H, W)))
    data = dataset(path, "mask_folder", options=OWN)
    assert data[0].question == "the crack" and (only_mask(data[0]) == whole).all()
    expected = cv2.resize(wide.astype(np.uint8), (W, H), interpolation=cv2.INTER_NEAREST).astype(bool)
    assert (only_mask(data[3]) == expected).all() and abs(int(expected.sum()) - 50) <= 5
    assert (only_mask(data[5]) == whole).mean() > 0.98
    for index, said in (
        (1, "b.jpg: no mask of this name"),
        (2, "c.png: the mask has no pixel"),
        (4, "the mask is 32x20 but"),
    ):
        with pytest.raises(DataError, match=said) as raised:
            data[index]
        assert raised.value.reason == "mask"


def test_pictures_without_a_camouflaged_object(tmp_path: Path) -> None:
    nothing = {"COD10K-NonCAM-3-Flying-1515": np.zeros((H, W), bool)}
    path = folders(tmp_path, **nothing, **{"COD10K-CAM-1-A-1-B-2": rectangle(5, 5, 15, 10, H, W)})
    assert [one.target.count for one in dataset(path, "mask_folder", options=OWN)] == [1]
    assert [one.target.count for one in dataset(path, "mask_folder", options=OWN | {"non_cam": True})] == [1, 0]


@pytest.mark.parametrize("options", [{}, {"layout": "cod10k"}, {"images": "rgb", "masks": "gt"}])
def test_folders_must_be_known(tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"give layout, one of cod10k_v3, .*; or images, masks and question"):
        dataset(folders(tmp_path, a=np.ones((H, W), bool)), "mask_folder", options=options)
    with pytest.raises(DataError, match=r"Imgs: no \.jpg or .* file there"):
        dataset(tmp_path, "mask_folder", options={"layout": "camouflage", "masks": "gt"})


# ---------------------------------------------------------------- EarthReason, Fox


def earth(folder: Path) -> Path:
    """Three files a folder whose names belong together only by their order."""
    label = rectangle(5, 5, 15, 10, H, W).astype(np.uint8)  # 0 and 1
    asked = [(["where to land", "the runway"], ["here"]), (["the lake"], []), (["the port"], ["there"])]
    for i, (questions, answer) in enumerate(asked):
        put(folder / "images" / f"picture_{i}.jpg", jpeg(noise(i, H, W)))
        put(folder / "labels" / f"l{i}.png", png(label * (1, 0, 255)[i]))
        suffix = "txt" if i else "json"
        put(folder / "QAs" / f"{i}.{suffix}", json.dumps({"questions": questions, "answer": answer}))
    return folder


def test_earth_reason(tmp_path: Path) -> None:
    data = dataset(earth(tmp_path), "earth_reason")
    assert [(one.id, one.question, one.target.count) for one in data] == [
        ("picture_0:0", "where to land", 1),
        ("picture_1:0", "the lake", 0),
        ("picture_2:0", "the port", 1),
    ]
    for index in (0, 2):
        assert (only_mask(data[index]) == rectangle(5, 5, 15, 10, H, W)).all()
    assert len(dataset(tmp_path, "earth_reason", options={"texts": "all"})) == 4
    put(tmp_path / "QAs" / "0.json", "{}")
    with pytest.raises(DataError, match=r"0.json: Object missing required field `questions`"):
        dataset(tmp_path, "earth_reason")[0]
    (tmp_path / "labels" / "l2.png").unlink()
    with pytest.raises(DataError, match=r"3 images, 2 labels, 3 QAs, which belong together by position"):
        dataset(tmp_path, "earth_reason")


def test_fox_pages(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "<image>\nOCR this image: "}, {"from": "gpt", "value": "A page.\nOf two lines."}]
    put(tmp_path / "focus" / "cn_page_ocr.json", json.dumps([{"image": "cn_1.png", "len": 21, "conversations": said}]))
    put(tmp_path / "focus" / "cn_pdf_png" / "cn_1.png", png(noise(0, H, W)))
    path = tmp_path / "focus" / "cn_page_ocr.json"
    (one,) = dataset(path, "fox_ocr")
    assert (one.question, one.task, one.target.text) == ("OCR this image:", "ocr", "A page.\nOf two lines.")
    assert one.target.known == {"text"}
    assert dataset(path, "fox_ocr", options={"task": "read"})[0].task == "read"
    put(path, json.dumps([{"image": "cn_1.png", "conversations": said[:1]}]))
    with pytest.raises(DataError, match=r"cn_page_ocr.json: .*conversations"):
        dataset(path, "fox_ocr")
