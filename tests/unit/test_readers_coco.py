"""Guards the readers of COCO's JSON and of LVIS: the published layouts with their quirks, pycocotools as reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from perception import masks
from perception.config import DataConfig
from perception.datasets import Dataset, load
from perception.errors import DataError
from perception.types import Sample
from tests.builders import noise, png

H, W = 6, 8
BLOCK = [[1, 1, 5, 1, 5, 4, 1, 4]]  # columns 1-4, rows 1-3: 12 pixels
CROWD = {"size": [H, W], "counts": [30, 6, 12]}  # column 5, uncompressed, column after column


def entry(key: int, image: int, category: int, **changes: Any) -> dict[str, Any]:
    plain = {"id": key, "image_id": image, "category_id": category, "iscrowd": 0, "area": 12.0}
    return plain | {"bbox": [1.0, 1.0, 4.0, 3.0], "segmentation": BLOCK} | changes


def picture(key: int, **changes: Any) -> dict[str, Any]:
    flickr = {"license": 3, "flickr_url": "http://f/x.jpg", "date_captured": "2013-11-14 11:18:45"}
    return {"id": key, "file_name": f"{key:012d}.png", "height": H, "width": W, **flickr} | changes


@pytest.fixture
def instances() -> dict[str, Any]:
    """As instances_val2017.json: ids with gaps, polygons, a crowd as uncompressed runs, an image without annotation."""
    names = {1: "person", 17: "cat", 90: "toothbrush", 91: "never annotated"}
    return {
        "info": {"year": 2017},
        "licenses": [{"id": 3, "name": "by"}],
        "images": [picture(key) for key in (139, 285, 632)],
        "annotations": [
            entry(11, 139, 1),
            entry(12, 139, 1, bbox=[5.0, 2.0, 2.0, 3.0], segmentation=[[5, 2, 7, 2, 7, 5, 5, 5]]),
            entry(900100000012, 139, 1, iscrowd=1, bbox=[5, 0, 1, 6], segmentation=CROWD),
            entry(13, 139, 17, bbox=[1.0, 1.0, 4.0, 0.0]),
            entry(14, 285, 90, segmentation=[[1, 1, 5, 1, 5, 4, 1, 4], [3, 2, 7, 2, 7, 5, 3, 5]], bbox=[1, 1, 6, 4]),
            entry(15, 285, 17, iscrowd=1, segmentation=CROWD, bbox=[5, 0, 1, 6]),
        ],
        "categories": [{"id": key, "name": name, "supercategory": "thing"} for key, name in names.items()],
    }


def write(folder: Path, document: Any, name: str = "instances_val2017.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(document), encoding="utf-8")
    for one in document["images"] if isinstance(document, dict) else ():
        file = folder / "images" / one.get("file_name", "/".join(one.get("coco_url", "").split("/")[-2:]))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(noise(one["id"], one["height"], one["width"])))
    return path


def opened(path: Path, kind: str = "coco", **changes: Any) -> Dataset:
    options = {name: changes.pop(name) for name in ("task", "absent", "crowds") if name in changes}
    config = DataConfig(format=kind, train=str(path), eval=str(path), options=options, **changes)
    return load(config, str(path))


def by_id(data: Dataset) -> dict[str, Sample]:
    return {sample.id: sample for sample in data}


def test_a_question_per_category_in_an_image(tmp_path: Path, instances: dict[str, Any]) -> None:
    samples = by_id(opened(write(tmp_path, instances)))
    # The cat of 139 has no height, that of 285 is a crowd alone: neither is asked for.
    assert list(samples) == ["139:person", "285:toothbrush"]
    person = samples["139:person"]
    assert (person.question, person.task, person.image.path[-16:]) == ("person", "segment", "000000000139.png")
    assert person.target.boxes.tolist() == [[1, 1, 5, 4], [5, 2, 7, 5]]
    assert person.target.labels == ("person", "person")
    assert [masks.area(mask) for mask in person.target.masks] == [12, 6]


def test_a_crowd_is_ignored_and_nothing_is_counted_beside_it(tmp_path: Path, instances: dict[str, Any]) -> None:
    target = by_id(opened(write(tmp_path, instances)))["139:person"].target
    assert target.ignore is not None
    assert np.argwhere(masks.decode(target.ignore)).tolist() == [[row, 5] for row in range(H)]
    assert not target.complete and "count" not in target.known and {"boxes", "masks"} <= target.known


def test_without_a_crowd_the_truth_is_whole(tmp_path: Path, instances: dict[str, Any]) -> None:
    target = by_id(opened(write(tmp_path, instances)))["285:toothbrush"].target
    assert (target.complete, target.ignore, target.count) == (True, None, 1)
    assert masks.area(target.masks[0]) == 20  # two overlapping polygons: what either covers


def test_masks_are_those_of_pycocotools(tmp_path: Path, instances: dict[str, Any]) -> None:
    path = write(tmp_path, instances)
    coco = COCO(str(path))
    for key, expected in (("139:person", (11, 12)), ("285:toothbrush", (14,))):
        found = by_id(opened(path))[key].target.masks
        for mask, annotation in zip(found, expected, strict=True):
            assert np.array_equal(masks.decode(mask), coco.annToMask(coco.anns[annotation]))


def test_crowds_may_be_objects_as_cvat_exports_them(tmp_path: Path) -> None:
    """CVAT "COCO 1.0": masks as uncompressed runs with iscrowd 1, ids from 1, file names with folders."""
    document = {
        "licenses": [{"name": "", "id": 0, "url": ""}],
        "info": {"contributor": "", "date_created": ""},
        "categories": [{"id": 1, "name": "scratch", "supercategory": ""}],
        "images": [picture(1, file_name="shift 1/part.png", coco_url="", flickr_url="", date_captured=0)],
        "annotations": [
            entry(1, 1, 1, iscrowd=1, segmentation=CROWD, bbox=[5.0, 0.0, 1.0, 6.0], attributes={"occluded": False})
        ],
    }
    path = write(tmp_path, document, "instances_default.json")
    (sample,) = opened(path, crowds="objects")
    assert sample.target.boxes.tolist() == [[5, 0, 6, 6]] and sample.target.complete
    assert masks.area(sample.target.masks[0]) == 6
    with pytest.raises(DataError, match=r"every annotation is a crowd; .* data.options.crowds=objects"):
        opened(path)


def test_roboflow_exports(tmp_path: Path) -> None:
    """Category 0 is a dummy parent, segmentation is empty, the original name stands in extra."""
    document = {
        "info": {"description": "Exported from roboflow.com"},
        "categories": [
            {"id": 0, "name": "my-project", "supercategory": "none"},
            {"id": 1, "name": "helmet", "supercategory": "my-project"},
        ],
        "images": [
            picture(0, file_name="a_jpg.rf.0123abcd.png", extra={"name": "a.jpg"}),
            picture(1, file_name="b_jpg.rf.4567cdef.png", extra={"name": "b.jpg"}),
        ],
        "annotations": [entry(0, 0, 1, segmentation=[])],
    }
    samples = by_id(opened(write(tmp_path, document, "_annotations.coco.json"), absent=3))
    assert list(samples) == ["0:helmet", "1:helmet"]  # never the dummy
    assert samples["0:helmet"].target.masks == () and samples["0:helmet"].target.boxes.tolist() == [[1, 1, 5, 4]]
    assert samples["1:helmet"].target.count == 0 and samples["1:helmet"].target.complete


def test_absent_categories_are_not_there_and_always_the_same(tmp_path: Path, instances: dict[str, Any]) -> None:
    path = write(tmp_path, instances)
    samples = by_id(opened(path, absent=2, task="ground"))
    absent = {key for key, sample in samples.items() if sample.target.count == 0}
    # 139 holds person and a cat without height, 285 toothbrush and a crowd of cats, 632 nothing.
    assert {"139:toothbrush", "285:person"} <= absent
    assert len([key for key in absent if key.startswith("632:")]) == 2
    assert not {"139:cat", "285:cat"} & samples.keys() and not any("never" in key for key in samples)
    assert {sample.task for sample in samples.values()} == {"ground"}
    assert samples.keys() == by_id(opened(path, absent=2, task="ground")).keys()


def test_the_standard_size_is_checked(tmp_path: Path, instances: dict[str, Any]) -> None:
    path = write(tmp_path, instances)
    (tmp_path / "images" / "000000000139.png").write_bytes(png(noise(0, H + 1, W)))
    with pytest.raises(DataError, match="8x7 but the annotations say 8x6") as error:
        opened(path)[0]
    assert error.value.reason == "size"


def first(document: dict[str, Any], **changes: Any) -> None:
    document["annotations"][0].update(changes)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        pytest.param(lambda d: first(d, bbox=["a", 1, 2, 3]), "image 139, person: ", id="box"),
        pytest.param(lambda d: first(d, segmentation=[[1, 2]]), "image 139, person: ", id="polygon"),
        pytest.param(lambda d: first(d, category_id=5), "annotation 1 of the list: no category", id="category"),
        pytest.param(lambda d: d["annotations"][0].pop("image_id"), "annotation 1 of the list: ", id="no image"),
        pytest.param(lambda d: first(d, image_id=7), "no image has id 7, which annotations name", id="which image"),
        pytest.param(lambda d: d["images"][0].update(height="tall"), "image 139: ", id="image"),
    ],
)
def test_bad_entries_are_single_bad_records(
    tmp_path: Path, instances: dict[str, Any], edit: Callable[[dict], Any], says: str
) -> None:
    path = write(tmp_path, instances)
    edit(instances)
    path.write_text(json.dumps(instances), encoding="utf-8")
    data = opened(path, on_bad_record="skip")
    assert "285:toothbrush" in {sample.id for sample in data.usable()}
    (fault,) = data.bad.values()
    assert str(fault).startswith(f"{path}: {says}") and "\n" not in str(fault)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "Expected `object`, got `array`"),
        ('{"images": [], "categories": []}', "missing required field `annotations`"),
        ('{"images": [], "annotations": []}', "neither expressions nor categories"),
        ('{"images": [], "annotations": [],\n', "not valid JSON"),
        ('{"images": [{"id": 1}, {"id": 1}], "annotations": [], "expressions": []}', "two image entries have id 1"),
    ],
)
def test_a_wrong_file_is_named_with_its_cause(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=says) as error:
        opened(path)
    assert str(error.value).startswith(str(path))


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        opened(tmp_path / "instances.json")
    with pytest.raises(DataError, match="cannot be read"):
        opened(tmp_path)


# ---------------------------------------------------------------- expressions


def test_what_no_expression_needs_is_never_read(tmp_path: Path, instances: dict[str, Any]) -> None:
    instances["images"] += [{"file_name": 5}, {"id": 9, "file_name": ["bad"]}]
    whole = write(tmp_path, instances | {"images": instances["images"][:3]})
    instances["annotations"] += [{"id": None}, {"id": 99, "image_id": {}, "bbox": "no"}, entry(98, 139, 1, bbox=[1])]
    ask = {"id": 1, "image_id": 139, "question": "the left one", "annotation_ids": [11]}
    instances["expressions"] = [
        ask,
        ask | {"id": 2, "annotation_ids": [98]},
        ask | {"id": 3, "image_id": 9},
        ask | {"id": 4, "question": ""},
        ask | {"id": 5, "image_id": 8},
        ask | {"id": 6, "annotation_ids": []},
    ]
    whole.write_text(json.dumps(instances), encoding="utf-8")
    data = opened(whole)
    assert len(data) == 6
    assert data[0].target.boxes.tolist() == [[1, 1, 5, 4]] and data[0].target.labels == ("person",)
    assert data[5].target.count == 0
    for index, says in (
        (1, r"expression 2, annotation 98: .*\$.bbox"),
        (2, r"image 9: .*\$.file_name"),
        (3, r"expression 4 of the list: .*\$.question"),
        (4, "expression 5: no image has id 8"),
    ):
        with pytest.raises(DataError, match=says):
            data[index]


# ---------------------------------------------------------------- LVIS


@pytest.fixture
def lvis(tmp_path: Path) -> Path:
    """As lvis_v1_val.json: no file_name, no iscrowd, names with underscores."""
    url = "http://images.cocodataset.org/{}/{:012d}.png"
    names = ["alarm_clock", "bow_(weapon)", "banana", "zebra", "shoe"]
    document = {
        "images": [
            picture(1, coco_url=url.format("train2017", 1), neg_category_ids=[4], not_exhaustive_category_ids=[5]),
            picture(2, coco_url=url.format("val2017", 2), neg_category_ids=[1, 3], not_exhaustive_category_ids=[]),
        ],
        "annotations": [entry(1, 1, 1), entry(2, 1, 5), entry(3, 2, 2), entry(4, 2, 5)],
        "categories": [
            {"id": key, "name": name, "synset": f"{name}.n.01", "synonyms": [name], "def": "a", "frequency": "r"}
            for key, name in enumerate(names, start=1)
        ],
    }
    for one in document["images"]:
        del one["file_name"]
    for one in document["annotations"]:
        del one["iscrowd"]
    return write(tmp_path, document, "lvis_v1_val.json")


def test_lvis_asks_only_for_what_is_wholly_annotated(lvis: Path) -> None:
    samples = by_id(opened(lvis, "lvis"))
    assert list(samples) == ["1:alarm clock", "2:bow (weapon)", "2:shoe"]
    assert samples["1:alarm clock"].image.path.endswith("train2017/000000000001.png")
    assert samples["2:shoe"].image.path.endswith("val2017/000000000002.png")
    assert samples["2:shoe"].question == "shoe" and samples["2:shoe"].target.count == 1


def test_lvis_absent_is_only_what_was_verified(lvis: Path) -> None:
    samples = by_id(opened(lvis, "lvis", absent=5))
    absent = {key for key, sample in samples.items() if sample.target.count == 0}
    assert absent == {"1:zebra", "2:alarm clock", "2:banana"}
