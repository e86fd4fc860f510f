"""Guards the reader of Label Studio: both exports, percent, turned shapes, and brushes as its packing has them."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception import masks
from perception.config import DataConfig
from perception.datasets import Dataset, load
from perception.datasets.label_studio import _pixels
from perception.errors import DataError
from tests.builders import noise, png, rectangle

H, W = 20, 40
"""A percent is .4 of a column, .2 of a row."""


def packed(values: list[int], sizes: tuple[int, ...] = (3, 4, 8, 16)) -> list[int]:
    """@thi.ng/rle-pack: a block of repeated values for each run of 3 or more, else a block of single ones."""
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    at = 0
    while at < len(values):
        run = next((n for n in range(at, len(values)) if values[n] != values[at]), len(values)) - at
        run = min(run, 2 ** sizes[-1])
        length = run if run >= 3 else 1
        which = next(n for n, size in enumerate(sizes) if length <= 2**size)
        bits += f"{int(run >= 3)}{which:02b}{length - 1:0{sizes[which]}b}{values[at]:08b}"
        at += length
    bits += "0" * (-len(bits) % 8)
    return [int(bits[n : n + 8], 2) for n in range(0, len(bits), 8)]


def brush(mask: np.ndarray) -> list[int]:
    """RGBA: a colour everywhere, the mask as alpha."""
    alpha = mask.astype(np.uint8) * 255
    return packed(np.stack([np.full_like(alpha, 7)] * 3 + [alpha], -1).ravel().tolist())


def region(kind: str, *labels: str, **value: Any) -> dict[str, Any]:
    """A result of the JSON export."""
    shape = {"original_width": W, "original_height": H, "image_rotation": 0, "type": kind, "id": "x", "to_name": "img"}
    return shape | {"value": value | {kind: list(labels)}}


RECTANGLE = {"x": 25.0, "y": 50.0, "width": 25.0, "height": 20.0}  # (10, 10) to (20, 14)
MASK = rectangle(3, 2, 12, 9, H, W)
REGIONS = [
    region("rectanglelabels", "car", **RECTANGLE, rotation=0),
    region("rectanglelabels", "turned", **RECTANGLE, rotation=90),
    region("polygonlabels", "tree", "plant", points=[[25, 50], [50, 50], [50, 70], [25, 70]], closed=True),
    region("keypointlabels", "nose", x=50.0, y=50.0, width=0.4),
    region("ellipselabels", "plate", x=50.0, y=50.0, radiusX=15.0, radiusY=30.0, rotation=0),
    region("brushlabels", "stain", format="rle", rle=brush(MASK)),
]


def write(folder: Path, content: Any) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / "1f2e-a b.png").write_bytes(png(noise(0, H, W)))
    path = folder / "export.json"
    path.write_text(json.dumps(content))
    return path


def read(path: Path, **options: Any) -> Dataset:
    return load(DataConfig(format="label_studio", train="", eval="", options=options), str(path))


def flat(one: dict[str, Any]) -> dict[str, Any]:
    """As JSON-MIN writes a region."""
    return one["value"] | {key: one[key] for key in ("original_width", "original_height")}


@pytest.mark.parametrize("export", ["JSON", "JSON-MIN", "url", "local"])
def test_both_exports(tmp_path: Path, export: str) -> None:
    names = {"url": "https://b.example/x/1f2e-a%20b.png?sig=1", "local": "/data/local-files/?d=images/1f2e-a%20b.png"}
    url = names.get(export, "/data/upload/1/1f2e-a%20b.png")
    verdict = {"type": "choices", "value": {"choices": ["good"]}}
    link = {"from_id": "x", "to_id": "y", "type": "relation", "direction": "right"}
    whole: dict[str, Any] = {"id": 7, "data": {"image": url}, "predictions": [{"result": REGIONS}]}
    whole["annotations"] = [{"was_cancelled": True, "result": REGIONS[:1] * 3}, {"result": [verdict, link, *REGIONS]}]
    least = {"id": 7, "image": url, "label": list(map(flat, REGIONS[:3])), "more": list(map(flat, REGIONS[3:]))}
    path = write(tmp_path, [least, least | {"label": []}] if export == "JSON-MIN" else [whole])
    found = {sample.question: sample for sample in read(path, task="ground")}
    assert list(found) == ["car", "turned", "tree", "plant", "nose", "plate", "stain"]
    assert {sample.image.path for sample in found.values()} == {str(tmp_path / "images" / "1f2e-a b.png")}
    assert found["car"].id == "task 7:car" and found["car"].task == "ground"
    truth = {name: sample.target for name, sample in found.items()}
    assert truth["car"].boxes.tolist() == [[10, 10, 20, 14]] and not truth["car"].masks
    assert truth["nose"].points.tolist() == [[20, 10]] and truth["nose"].known == {"points", "count", "labels"}
    # Turned clockwise about its upper left corner: x runs down, y to the left.
    for name, box in (("turned", (6, 10, 10, 20)), ("tree", (10, 10, 20, 14)), ("plant", (10, 10, 20, 14))):
        np.testing.assert_array_equal(masks.decode(truth[name].masks[0]), rectangle(*box, H, W))
    np.testing.assert_array_equal(masks.decode(truth["stain"].masks[0]), MASK)
    rows, columns = np.mgrid[:H, :W] + 0.5
    disc = np.hypot(columns - 20, rows - 10) <= 6
    assert (masks.decode(truth["plate"].masks[0]) != disc).sum() <= 4


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_a_brush_comes_back(seed: int, height: int, width: int, smooth: bool) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, (height, width, 4))
    if smooth:
        values[...] = values[0, 0]
    np.testing.assert_array_equal(_pixels(packed(values.ravel().tolist()), height, width), values[..., 3] > 127)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=60), st.booleans())
def test_no_damaged_brush_crashes_or_grows(rle: list[int], head: bool) -> None:
    """Every length that a file may state is bounded by the image's size."""
    with suppress(ValueError):
        assert _pixels(packed([0] * 16)[:7] * head + rle, 2, 2).shape == (2, 2)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (region("brushlabels", "a", format="rle", rle=brush(MASK)[:-9]), "the mask cannot be read"),
        (region("brushlabels", "a", format="rle", rle=brush(MASK[:9])), "the mask cannot be read"),
        (region("brushlabels", "a", format="rle", rle=["x"]), "the mask cannot be read"),
        (region("brushlabels", "a", format="rle", rle=brush(MASK & False)), "no pixel is set"),
        (region("rectanglelabels", "a", **RECTANGLE | {"width": 90.0}), "leaves the 40x20 image"),
        (region("vectorlabels", "a", vertices=[[1, 2]]), "a path has no area"),
        (region("rectanglelabels", "a", **RECTANGLE) | {"image_rotation": 90}, "turn its file"),
        (region("rectanglelabels", "a", **RECTANGLE) | {"original_width": 20, "original_height": 40}, "say 20x40"),
        (region("polygonlabels", "a", points=[[1]]), "the annotation cannot be read"),
    ],
)
def test_a_bad_region_is_one_bad_record(tmp_path: Path, bad: dict[str, Any], says: str) -> None:
    good = {"image": "/data/upload/1f2e-a%20b.png"}
    tasks = [{"id": n, "data": good, "annotations": [{"result": [one]}]} for n, one in enumerate((bad, REGIONS[0]))]
    data = read(write(tmp_path, tasks))
    assert len(data) == 2 and data[1].target.count == 1
    with pytest.raises(DataError, match=says) as caught:
        _ = data[0]
    assert "\n" not in str(caught.value) and "task 0" in str(caught.value)


def test_a_task_without_annotations_asks_nothing_and_another_key_may_name_the_picture(tmp_path: Path) -> None:
    empty = {"id": 1, "data": {"photo": "x"}, "annotations": []}
    one = {"id": 2, "data": {"photo": "images/1f2e-a b.png"}, "annotations": [{"result": [REGIONS[0]]}]}
    (sample,) = read(write(tmp_path, [empty, one]), image="photo")
    assert sample.id == "task 2:car"
    with pytest.raises(DataError, match=r"task 2: the annotation cannot be read \(KeyError\('image'\)\)"):
        _ = read(write(tmp_path, [one]))[0]
