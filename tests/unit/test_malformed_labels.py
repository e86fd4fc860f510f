"""Guards the readers of annotation tools against what no tool writes: a record that is refused, never a crash."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from perception.config import DataConfig
from perception.datasets import load
from perception.errors import DataError
from tests.builders import noise, png

PICTURE = png(noise(0, 20, 30))
REGION = {"original_width": 30, "original_height": 20, "image_rotation": 0, "value": {"x": 1, "y": 2, "width": 9}}
DOCUMENTS: dict[str, Any] = {
    "labelme": {
        "imagePath": "a.png",
        "imageData": None,
        "imageHeight": 20,
        "imageWidth": 30,
        "shapes": [
            {"label": "a", "points": [[1, 1], [9, 9]], "shape_type": kind, "group_id": 1, "mask": "aGVsbG8="}
            for kind in ("rectangle", "circle", "point", "mask", "polygon", "line")
        ],
    },
    "label_studio": [
        {
            "id": 1,
            "data": {"image": "a.png"},
            "annotations": [
                {
                    "result": [
                        REGION | {"value": REGION["value"] | {"rectanglelabels": ["a"], "height": 3, "rotation": 4}},
                        REGION | {"value": {"polygonlabels": ["b"], "points": [[1, 1], [9, 9], [1, 9]]}},
                        REGION | {"value": REGION["value"] | {"keypointlabels": ["c"]}},
                        REGION | {"value": {"brushlabels": ["d"], "rle": [0, 0, 9, 96, 57]}},
                        REGION | {"value": {"x": 9, "y": 9, "radiusX": 3, "radiusY": 4, "ellipselabels": ["e"]}},
                    ]
                }
            ],
        }
    ],
}
junk = st.one_of(
    st.sampled_from([None, True, "", "a", [], {}, [[]], [1], -1, 0, 10**400, 1e308, -1e308, [[1, 2, 3]], [["a", "b"]]]),
    st.floats(-1e3, 1e3),
    st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), max_size=4),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every part of a document."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [at, *(way for key in keys for way in places(value[key], (*at, key)))]


@contextmanager
def perhaps_refused() -> Iterator[None]:
    """Nothing but a DataError of one line may come out."""
    message = ""
    try:
        yield
    except DataError as error:
        message = str(error)
    assert "\n" not in message


def read_all(format_: str, name: str, content: bytes, labels: bytes = b"") -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "a.png").write_bytes(PICTURE)
        (root / "a.txt").write_bytes(labels)
        (root / name).write_bytes(content)
        with perhaps_refused():
            data = load(DataConfig(format=format_, train="", eval=""), str(root if format_ == "voc" else root / name))
            for index in range(len(data)):
                with perhaps_refused():
                    assert data[index].target.count > 0 and data[index].question


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(sorted(DOCUMENTS)), st.data())
def test_no_value_of_a_json_document_crashes_a_reader(format_: str, data: st.DataObject) -> None:
    document = copy.deepcopy(DOCUMENTS[format_])
    for _ in range(data.draw(st.integers(1, 3))):
        ways = places(document)[1:]
        *head, last = data.draw(st.sampled_from(ways))
        parent = document
        for key in head:
            parent = parent[key]
        if data.draw(st.booleans()):
            parent[last] = copy.deepcopy(data.draw(junk))
        else:
            del parent[last]
        if not places(document)[1:]:
            break
    read_all(format_, "x.json", json.dumps(document).encode())


numbers = st.sampled_from(["0", "-1", "5", "9.5", "1e400", "nan", "", "a", "1,2", "1,2;3,4", "1,2;3,4;5,9", "99999999"])
KEYS = {
    "box": ("xtl", "ytl", "xbr", "ybr", "rotation"),
    "polygon": ("points",),
    "points": ("points",),
    "ellipse": ("cx", "cy", "rx", "ry", "rotation"),
    "mask": ("rle", "left", "top", "width", "height"),
    "cuboid": ("xtl1",),
}


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(sorted(KEYS)), st.lists(numbers, min_size=5, max_size=5), numbers)
@example("mask", ["0,1000000000000", "0", "0", "1000000", "1000000"], "20")
def test_no_attribute_crashes_the_reader_of_cvat(kind: str, values: list[str], size: str) -> None:
    given_ = " ".join(f'{key}="{value}"' for key, value in zip(KEYS[kind], values, strict=False))
    image = f'<image id="0" name="a.png" width="30" height="{size}"><{kind} label="a" {given_}/></image>'
    read_all("cvat", "x.xml", f"<annotations>{image}</annotations>".encode())


@settings(max_examples=60, deadline=None)
@given(st.lists(numbers, min_size=4, max_size=4), numbers)
def test_no_number_crashes_the_reader_of_voc(values: list[str], size: str) -> None:
    box = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), values, strict=True)
    )
    head = f"<filename>a.png</filename><size><width>{size}</width><height>20</height></size>"
    content = f"<annotation>{head}<object><name>a</name><bndbox>{box}</bndbox></object></annotation>"
    read_all("voc", "x.xml", content.encode())


NAMES = ("names: [a, b]", "names: {0: a, 1: b}", "names: 3", "[]", "names:", "names: [a]\npath: 3")
TRAIN = ("train: .", "train: [., 3]", "train: 3", "train:", "train: {a: b}", "{", "kpt_shape: 1\ntrain: .")
row = st.lists(numbers | st.sampled_from(["1", ".5", ".2"]), max_size=9)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from(TRAIN), row)
def test_no_row_or_setting_crashes_the_reader_of_yolo(names: str, train: str, row: list[str]) -> None:
    read_all("yolo", "data.yaml", f"{names}\n{train}\n".encode(), " ".join(row).encode())
