"""Guards the tables of PixMo-Count, PixMo-Points and CountBench: frames of points, counts alone, telling captions."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perception.config import DataConfig
from perception.datasets import Dataset, load
from perception.errors import DataError
from perception.types import ImageSource
from tests.builders import noise, png

datasets = pytest.importorskip("datasets")

H, W = 40, 80
PICTURE = png(noise(3, H, W))
SHA = hashlib.sha256(PICTURE).hexdigest()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """The downloads, by hash and by row."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in (f"{SHA}.jpg", "00000.jpg", "00001.jpg"):
        (folder / name).write_bytes(PICTURE)
    return folder


def table(path: Path, rows: list[dict[str, Any]], features: Any = None) -> Path:
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    return path


def opened(path: Path, images: Path | None = None, kind: str = "pixmo", **options: Any) -> Dataset:
    folder = str(images) if images else None
    config = DataConfig(format=kind, train=str(path), eval=str(path), images=folder, options=options)
    return load(config, str(path))


def pixmo_count(folder: Path, points: Any, count: int = 2) -> Path:
    """As allenai/pixmo-count: a dictionary of lists, in pixels."""
    value = datasets.Value
    features = datasets.Features(
        {
            "image_url": value("string"),
            "image_sha256": value("string"),
            "count": value("int32"),
            "points": {"x": [value("float32")], "y": [value("float32")]},
            "label": value("string"),
        }
    )
    row = {"image_url": "https://x/y.jpg", "image_sha256": SHA, "count": count, "label": "mugs", "points": points}
    return table(folder / "train.parquet", [row], features)


def pixmo_points(folder: Path, points: list[tuple[float, float]], count: int) -> Path:
    """As allenai/pixmo-points: a list of dictionaries, in percent."""
    given = [{"x": x, "y": y} for x, y in points]
    row = {"image_url": "https://x/y.jpg", "image_sha256": SHA, "count": count, "label": "mugs", "points": given}
    kinds = {name: datasets.Value(kind) for name, kind in (("x", "float64"), ("y", "float64"))}
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("image_url", "image_sha256", "label", "collection_method")}
        | {"count": datasets.Value("int64"), "points": datasets.List(kinds)}
    )
    return table(folder / "train.parquet", [row | {"collection_method": "pointing"}], features)


def test_points_of_pixmo_count_are_pixels(tmp_path: Path, pictures: Path) -> None:
    (sample,) = opened(pixmo_count(tmp_path, {"x": [10.5, 79], "y": [8, 39.5]}), pictures)
    assert (sample.id, sample.question, sample.task) == ("row 0", "mugs", "count")
    assert sample.image.path == str(pictures / f"{SHA}.jpg")
    assert sample.target.points.tolist() == [[10.5, 8], [79, 39.5]] and sample.target.points.dtype == np.float32
    assert sample.target.count == 2 and sample.target.known == {"points", "count"}


def test_points_of_pixmo_points_are_percent(tmp_path: Path, pictures: Path) -> None:
    (sample,) = opened(pixmo_points(tmp_path, [(10, 50), (100, 0.5)], 2), pictures, task="point")
    assert sample.target.points.tolist() == [[8, 20], [80, pytest.approx(0.2)]]
    assert sample.task == "point" and sample.target.known == {"points", "count"}


@pytest.mark.parametrize("points", [{"x": [], "y": []}, None])
def test_a_count_alone(tmp_path: Path, pictures: Path, points: Any) -> None:
    (sample,) = opened(pixmo_count(tmp_path, points, count=7), pictures)
    assert sample.target.count == 7 and sample.target.known == {"count"}


def test_a_count_of_zero_says_that_nothing_is_there(tmp_path: Path, pictures: Path) -> None:
    (sample,) = opened(pixmo_points(tmp_path, [], 0), pictures)
    assert sample.target.count == 0
    assert sample.target.known == {"boxes", "points", "masks", "labels", "count"}


@pytest.mark.parametrize(
    ("points", "count", "reason"),
    [({"x": [1.0], "y": [1.0]}, 2, "truth"), ({"x": [1.0, 82.0], "y": [1.0, 1.0]}, 2, "point")],
)
def test_points_that_cannot_be_right(tmp_path: Path, pictures: Path, points: Any, count: int, reason: str) -> None:
    with pytest.raises(DataError, match="row 0") as error:
        opened(pixmo_count(tmp_path, points, count), pictures)[0]
    assert error.value.reason == reason


def test_pictures_by_the_row(tmp_path: Path, pictures: Path) -> None:
    path = pixmo_count(tmp_path, {"x": [1, 2], "y": [1, 2]})
    (sample,) = opened(path, pictures, name="{row:05d}.jpg")
    assert sample.image.path == str(pictures / "00000.jpg")
    with pytest.raises(DataError, match=r"no image 0\.jpg in") as error:
        opened(path, pictures, name="{row}.jpg")[0]
    assert error.value.reason == "image"
    with pytest.raises(DataError, match=r"KeyError\('hash'\): .* data.options.name='\{hash\}.jpg'"):
        opened(path, pictures, name="{hash}.jpg")


def test_a_table_of_something_else(tmp_path: Path) -> None:
    captions = table(tmp_path / "cap.parquet", [{"image_sha256": SHA, "caption": "A mug."}])
    for kind, says in (("pixmo", "needs label"), ("countbench", "none of the columns question, text")):
        with pytest.raises(DataError, match=says):
            opened(captions, kind=kind)


def countbench(folder: Path, **texts: list[str]) -> Path:
    rows: dict[str, Any] = {"image": [{"bytes": PICTURE, "path": None}, None], "number": [4, 10], **texts}
    given = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    given.to_parquet(folder / "test.parquet")
    return folder / "test.parquet"


def test_countbench_asks_its_question(tmp_path: Path) -> None:
    questions = ["How many cups are there in the image?", "How many hats?"]
    path = countbench(tmp_path, text=["Set of four cups", "Ten hats"], question=questions)
    sample = opened(path, kind="countbench")[0]
    assert (sample.question, sample.target.count, sample.target.known) == (questions[0], 4, {"count"})
    assert sample.image == ImageSource(path=str(path), row=0) and (sample.height, sample.width) == (H, W)


def test_a_caption_of_countbench_does_not_give_the_number_away(tmp_path: Path) -> None:
    """nielsr/countbench has captions only, and rows whose image is null."""
    data = opened(countbench(tmp_path, text=["Set of four cups", "Ten hats, often worn"]), kind="countbench")
    assert data[0].question == "Set of cups"
    assert data.records[1].question == "hats, often worn"
    with pytest.raises(DataError, match="holds no image") as error:
        data[1]
    assert error.value.reason == "image"
