"""Guards the reader of COCO files with expressions: truth by annotation, and every fault names its expression."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perception import masks
from perception.errors import DataError
from tests.builders import dataset, rectangle

H, W = 20, 30
POLYGON = [5, 5, 15, 5, 15, 10, 5, 10]


def document() -> dict[str, Any]:
    columns = {"size": [H, W], "counts": [0, 60, H * W - 60]}
    whole = {"id": 11, "image_id": 1, "category_id": 3, "bbox": [5, 5, 10, 5], "segmentation": [POLYGON]}
    return {
        "images": [{"id": 1, "file_name": "a.png", "height": H, "width": W}],
        "categories": [{"id": 3, "name": "car"}],
        "annotations": [
            whole | {"point": [6, 6]},
            {"id": 12, "image_id": 1, "category_id": 3, "segmentation": columns},
            {"id": 13, "image_id": 1, "bbox": [0, 0, 2, 2]},
        ],
        "expressions": [
            {"id": "a", "image_id": 1, "question": "both cars", "annotation_ids": [11, 12]},
            {"id": "b", "image_id": 1, "question": "the bus", "annotation_ids": []},
            {"id": "c", "image_id": 1, "question": "how many", "task": "count", "annotation_ids": [13]},
        ],
    }


def write(folder: Path, content: Any) -> Path:
    path = folder / "annotations.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_coco_with_expressions(folder: Path) -> None:
    both, bus, count = dataset(write(folder, document()))
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
    assert dataset(write(folder, document()))[0].image.path == str(folder / "images" / "a.png")


def test_what_no_expression_uses_is_not_read(folder: Path) -> None:
    content = document()
    content["images"].append({"id": 2, "file_name": "nowhere.png"})
    content["annotations"].append({"id": 14, "image_id": 2, "segmentation": [[1, 2, "x"]], "bbox": [5, 5, 0, 900]})
    assert [one.id for one in dataset(write(folder, content))] == ["a", "b", "c"]


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
        (lambda _: "{", "annotations.json: not valid JSON"),
        (lambda _: [], "Expected `object`, got `array`"),
        (lambda content: {k: content[k] for k in ("images", "annotations")}, "neither expressions nor categories"),
        (change("expressions", to=[]), "the data set is empty"),
        (change("expressions", 1, "id", to="a"), "two samples have the id 'a'"),
        (change("annotations", 1, "id", to=11), "two annotation entries have id 11"),
    ],
)
def test_a_bad_coco_file_is_named(folder: Path, edit: Callable[[dict], Any], says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        dataset(write(folder, edit(document())))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "bad", "says"),
    [
        (change("expressions", 1, "image_id", to=9), "b", "expression b: no image has id 9"),
        (change("expressions", 0, "annotation_ids", to=[99]), "a", "expression a: image 1 has no annotation 99"),
        (change("expressions", 0, "annotation_ids", to=[11, 13]), "a", "expression a: 1 of 2 objects have a mask"),
        (change("images", 0, "file_name", to="b.png"), "abc", "no image b.png"),
        (change("images", 0, "file_name", to="large.png"), "abc", "more than 1000"),
        (change("images", 0, "height", to=21), "abc", "is 30x20 but the annotations say 30x21: one of them was resi"),
        (
            change("annotations", 0, "segmentation", to=[[1, 2, "x", 4, 5, 6]]),
            "a",
            "annotation 11: unreadable segmentation",
        ),
        (change("annotations", 0, "segmentation", to=[[1e9, 2, 3, 4, 5, 6]]), "a", "annotation 11: .*far outside"),
        (change("annotations", 0, "segmentation", to=[40, 40, 50]), "a", "annotation 11: "),
        (change("annotations", 0, "segmentation", to=[[1, 2, 3, 4]]), "a", "annotation 11: "),
        (change("annotations", 0, "bbox", to=[25, 5, 10, 5]), "a", "leaves the 30x20 image"),
        (change("annotations", 0, "bbox", to=[5, 5, 0, 5]), "a", "is empty"),
        (change("annotations", 2, "bbox", to=None), "c", "neither box nor mask"),
    ],
)
def test_a_bad_expression_is_named_and_the_others_stay(
    folder: Path, edit: Callable[[dict], Any], bad: str, says: str
) -> None:
    data = dataset(write(folder, edit(document())), refuse_pixels=1000)
    for index, name in enumerate("abc"):
        if name in bad:
            with pytest.raises(DataError, match=says) as caught:
                data[index]
            assert "\n" not in str(caught.value)
        else:
            assert data[index].id == name
