"""Guards the readers of label maps and Open Images: the published layouts with their quirks, expectations by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perception import masks
from perception.config import DataConfig
from perception.datasets import load
from perception.errors import DataError, UserError
from perception.types import Sample
from tests.builders import noise, png

H, W = 4, 6


def opened(kind: str, path: Path, images: Path, **options: Any) -> dict[str, Sample]:
    config = DataConfig(format=kind, train=str(path), eval=str(path), images=str(images), options=options)
    return {sample.id: sample for sample in load(config, str(path))}


def encoded(values: np.ndarray, palette: bool = False) -> bytes:
    """A PNG with exactly these values; as indices of a palette on demand."""
    image = Image.fromarray(values.astype(np.uint8))
    if palette:
        image.putpalette([255 - value for value in range(256) for _ in range(3)])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pixels(mask: Any) -> list[list[int]]:
    return masks.decode(mask).astype(int).tolist()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("000000000139.jpg", "000000000285.jpg", "0001eeaf4aed83f9.jpg", "000595fe6fee6369.jpg"):
        (folder / name).write_bytes(png(noise(1, H, W)))
    return folder


# ---------------------------------------------------------------- panoptic

CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1, "color": [220, 20, 60], "supercategory": "person"},
    {"id": 200, "name": "rug-merged", "isthing": 0, "color": [250, 141, 255], "supercategory": "furniture"},
    {"id": 17, "name": "cat", "isthing": 1, "color": [255, 179, 240], "supercategory": "animal"},
]
# RGB (10, 1, 0) is 10 + 256 = 266, (0, 0, 1) is 65536, (3, 0, 0) is 3.
COLOURS = {"p": (10, 1, 0), "q": (0, 0, 1), "r": (3, 0, 0), ".": (0, 0, 0)}
DRAWN = ["pp..qq", "pp..qq", "rrrrrr", "rrrrr."]


def drawn(rows: list[str] = DRAWN) -> bytes:
    return encoded(np.array([[COLOURS[letter] for letter in row] for row in rows]))


def segments(crowd: int = 0) -> list[dict[str, Any]]:
    plain = [(266, 1, 0), (65536, 1, crowd), (3, 200, 0)]
    return [
        {"id": key, "category_id": category, "iscrowd": flag, "area": 4, "bbox": [0, 0, 2, 2]}
        for key, category, flag in plain
    ]


def image_info(key: int) -> dict[str, Any]:
    return {
        "id": key,
        "file_name": f"{key:012d}.jpg",
        "height": H,
        "width": W,
        "coco_url": "http://c/x.jpg",
        "license": 1,
    }


def panoptic(folder: Path, crowd: int = 0) -> Path:
    (folder / "panoptic_val2017").mkdir()
    (folder / "panoptic_val2017" / "000000000139.png").write_bytes(drawn())
    path = folder / "panoptic_val2017.json"
    annotation = {"image_id": 139, "file_name": "000000000139.png", "segments_info": segments(crowd)}
    document = {"info": {}, "licenses": [], "images": [image_info(139)], "annotations": [annotation]}
    path.write_text(json.dumps(document | {"categories": CATEGORIES}))
    return path


def test_panoptic_things_are_instances_and_void_is_ignored(tmp_path: Path, pictures: Path) -> None:
    samples = opened("panoptic", panoptic(tmp_path), pictures, absent=2)
    assert list(samples) == ["139:person", "139:rug-merged", "139:cat"]
    person = samples["139:person"].target
    assert person.boxes.tolist() == [[0, 0, 2, 2], [4, 0, 6, 2]]
    assert person.labels == ("person", "person") and person.complete and person.count == 2
    assert person.ignore is not None
    assert pixels(person.ignore) == [[int(letter == ".") for letter in row] for row in DRAWN]
    assert pixels(samples["139:rug-merged"].target.masks[0]) == [
        [int(letter == "r") for letter in row] for row in DRAWN
    ]
    assert samples["139:cat"].target.count == 0 and samples["139:cat"].target.ignore == person.ignore


def test_a_panoptic_crowd_is_ignored(tmp_path: Path, pictures: Path) -> None:
    target = opened("panoptic", panoptic(tmp_path, crowd=1), pictures)["139:person"].target
    assert target.boxes.tolist() == [[0, 0, 2, 2]] and not target.complete
    assert target.ignore is not None
    assert pixels(target.ignore) == [[int(letter in ".q") for letter in row] for row in DRAWN]


def test_a_segment_without_pixels_is_refused(tmp_path: Path, pictures: Path) -> None:
    path = panoptic(tmp_path)
    (tmp_path / "panoptic_val2017" / "000000000139.png").write_bytes(drawn(["rrrrrr"] * H))
    with pytest.raises(DataError, match="has no pixel of 266") as error:
        opened("panoptic", path, pictures)
    assert error.value.reason == "mask"


def test_unknown_categories_and_images_are_broken_records(tmp_path: Path, pictures: Path) -> None:
    path = panoptic(tmp_path)
    document = json.loads(path.read_text())
    for change in ({"categories": CATEGORIES[:1]}, {"images": []}):
        path.write_text(json.dumps(document | change))
        with pytest.raises(DataError, match=r"000000000139.png: .*; add the image or category"):
            opened("panoptic", path, pictures)


def test_coconut_tables(tmp_path: Path, pictures: Path) -> None:
    datasets = pytest.importorskip("datasets")
    info = {"file_name": "000000000139.png", "image_id": 139, "segments_info": segments()}
    row = {"mask": [{"bytes": drawn(), "path": None}], "segments_info": [info], "image_info": [image_info(139)]}
    datasets.Dataset.from_dict(row).cast_column("mask", datasets.Image()).to_parquet(tmp_path / "coconut.parquet")
    names = tmp_path / "panoptic_coco_categories.json"
    names.write_text(json.dumps({"categories": CATEGORIES}))
    samples = opened("panoptic", tmp_path / "coconut.parquet", pictures, categories=str(names))
    assert list(samples) == ["139:person", "139:rug-merged"]
    assert samples["139:person"].target.boxes.tolist() == [[0, 0, 2, 2], [4, 0, 6, 2]]


# ---------------------------------------------------------------- COCO-Stuff


def stuff(folder: Path, *maps: np.ndarray, palette: bool = False) -> Path:
    """Maps of 139 and 285, and labels.txt beside their folder."""
    names = {0: "unlabeled", 1: "person", 2: "bicycle", 92: "banner", 93: "blanket", 182: "wood"}
    (folder / "labels.txt").write_text("\n".join(f"{key}: {name}" for key, name in names.items()) + "\n")
    (folder / "val2017").mkdir()
    for key, values in zip((139, 285), maps, strict=False):
        (folder / "val2017" / f"{key:012d}.png").write_bytes(encoded(values, palette))
    return folder / "val2017"


@pytest.mark.parametrize("palette", [False, True])
@pytest.mark.parametrize(
    ("person", "banner", "blanket", "void"),
    [(0, 91, 92, 255), (None, 92, 93, 0)],
    ids=["stuffthingmaps", "pixelmaps"],
)
def test_both_releases_of_coco_stuff(
    tmp_path: Path, pictures: Path, person: int | None, banner: int, blanket: int, void: int, palette: bool
) -> None:
    one, two = np.full((H, W), banner), np.full((H, W), blanket)
    one[0, :2], one[3] = void, blanket
    two[1, 1] = 183 if person is None else person
    path = stuff(tmp_path, one, two, palette=palette)
    samples = opened("coco_stuff", path, pictures, labels=str(tmp_path / "labels.txt"), absent=1)
    names = ["139:banner", "139:blanket", "285:blanket", "285:banner"]  # the last is absent
    names += ["285:person", "139:person"] if person == 0 else []  # likewise; never of "all things"
    assert samples.keys() == {f"000000000{name}" for name in names}
    assert {key[9:] for key, one in samples.items() if not one.target.boxes.size} == {"285:banner", *names[5:]}
    target = samples["000000000139:banner"].target
    assert pixels(target.masks[0]) == (one == banner).astype(int).tolist()
    assert target.ignore is not None and pixels(target.ignore) == (one == void).astype(int).tolist()
    assert "count" not in target.known and "masks" in target.known  # a map does not tell instances apart


@pytest.mark.parametrize(
    ("values", "says"),
    [([1, 255, 183], "both releases; part them"), ([100, 0], "neither release for certain; set data.options.release")],
)
def test_the_releases_of_coco_stuff_are_never_mixed(
    tmp_path: Path, pictures: Path, values: list[int], says: str
) -> None:
    path = stuff(tmp_path, np.array([values] * 4))
    with pytest.raises(DataError, match=says):
        opened("coco_stuff", path, pictures, labels=str(tmp_path / "labels.txt"))


def test_the_release_may_be_stated(tmp_path: Path, pictures: Path) -> None:
    path = stuff(tmp_path, np.full((H, W), 92))
    for release, name in (("pixelmaps", "banner"), ("stuffthingmaps", "blanket")):
        samples = opened("coco_stuff", path, pictures, labels=str(tmp_path / "labels.txt"), release=release)
        assert list(samples) == [f"000000000139:{name}"]


# ---------------------------------------------------------------- Open Images

HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
CLASSES = "/m/011k07,Tortoise\n/m/04yx4,Man\n/m/01g317,Person\n"
BOXES = [
    "0001eeaf4aed83f9,xclick,/m/011k07,1,0.5,1.0,0.25,0.75,0,0,0,0,0",
    "0001eeaf4aed83f9,xclick,/m/011k07,1,0.0,0.5,0.0,0.25,-1,0,1,0,0",
    "0001eeaf4aed83f9,xclick,/m/01g317,1,0.0,0.5,0.0,0.25,0,0,1,0,0",
    "000595fe6fee6369,activemil,/m/04yx4,1,0.0,1.0,0.5,1.0,0,1,0,0,0",
]


def open_images(folder: Path, header: str = "") -> dict[str, str]:
    (folder / "classes.csv").write_text(header + CLASSES)
    (folder / "validation-annotations-bbox.csv").write_text("\n".join([HEADER, *BOXES]) + "\n")
    labels = ["ImageID,Source,LabelName,Confidence", "0001eeaf4aed83f9,verification,/m/04yx4,0"]
    labels += ["0001eeaf4aed83f9,verification,/m/011k07,1", "000595fe6fee6369,verification,/m/0unknown,0"]
    (folder / "labels.csv").write_text("\n".join(labels) + "\n")
    return {"classes": str(folder / "classes.csv"), "negatives": str(folder / "labels.csv")}


@pytest.mark.parametrize("header", ["", "LabelName,DisplayName\n"])
def test_open_images_boxes(tmp_path: Path, pictures: Path, header: str) -> None:
    options = open_images(tmp_path, header)
    samples = opened("open_images", tmp_path / "validation-annotations-bbox.csv", pictures, **options, absent=3)
    # The person is a group alone: not asked for. Only the man is verified to be absent.
    assert list(samples) == ["0001eeaf4aed83f9:Tortoise", "0001eeaf4aed83f9:Man", "000595fe6fee6369:Man"]
    tortoise = samples["0001eeaf4aed83f9:Tortoise"].target
    assert tortoise.boxes.tolist() == [[3, 1, 6, 3]]  # of 6x4: XMin, XMax, YMin, YMax
    assert "count" not in tortoise.known and tortoise.ignore is not None
    assert pixels(tortoise.ignore) == [[1, 1, 1, 0, 0, 0]] + [[0] * W] * 3
    assert samples["0001eeaf4aed83f9:Man"].target.count == 0 and samples["0001eeaf4aed83f9:Man"].target.complete
    man = samples["000595fe6fee6369:Man"].target
    assert man.boxes.tolist() == [[0, 2, 6, 4]] and man.complete and man.labels == ("Man",)


def test_open_images_masks_are_brought_to_the_image_size(tmp_path: Path, pictures: Path) -> None:
    options = open_images(tmp_path)
    name = "0001eeaf4aed83f9_m011k07_9a041d52.png"
    (tmp_path / "masks").mkdir()
    half = np.array([[0, 0, 1], [0, 1, 1]]) * 255  # half the image's size
    (tmp_path / "masks" / name).write_bytes(encoded(half))
    header = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"
    row = f'{name},0001eeaf4aed83f9,/m/011k07,9a041d52,0.333333,1.0,0.0,1.0,0.86864,"0.95498 0.65197 1;0.8 0.6 0"'
    path = tmp_path / "validation-annotations-object-segmentation.csv"
    path.write_text(f"{header}\n{row}\n")
    (sample,) = opened("open_images", path, pictures, **options).values()
    assert pixels(sample.target.masks[0]) == [[0, 0, 0, 0, 1, 1]] * 2 + [[0, 0, 1, 1, 1, 1]] * 2
    assert sample.target.boxes[0] == pytest.approx([2, 0, 6, 4], abs=1e-4)
    assert "count" not in sample.target.known  # not every box has a mask


def test_open_images_files_of_another_form(tmp_path: Path, pictures: Path) -> None:
    options = open_images(tmp_path)
    path = tmp_path / "validation-annotations-bbox.csv"
    with pytest.raises(UserError, match=r"data.options: 'classes' is missing"):
        opened("open_images", path, pictures)
    with pytest.raises(DataError, match="no such file"):
        opened("open_images", path, pictures, **options | {"classes": str(tmp_path / "none.csv")})
    path.write_text(HEADER.replace("XMax", "X2") + "\n" + BOXES[0] + "\n")
    with pytest.raises(DataError, match="no column or class 'XMax'"):
        opened("open_images", path, pictures, **options)
