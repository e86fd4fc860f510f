"""Guards tables: rows of parquet files and saved data sets, read one by one, images still encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perception.datasets.files import Images
from perception.errors import DataError, UserError
from perception.images import decode, encode, probe, read, source_key
from perception.tables import open_table
from perception.types import ImageSource
from tests.builders import noise

datasets = pytest.importorskip("datasets")
H, W, ROWS = 9, 7, 4


def table(image: str = "bytes") -> Any:
    """Four rows with an image each: as bytes, as the hub's struct with bytes or with a path, or in a list."""
    data = [encode(noise(i, H, W)) for i in range(ROWS)]
    cells: dict[str, tuple[list[Any], Any]] = {
        "bytes": (data, datasets.Value("binary")),
        "struct": ([{"bytes": one, "path": None} for one in data], datasets.Image()),
        "list": ([[{"bytes": one, "path": None}] for one in data], datasets.List(datasets.Image())),
    }
    values, kind = cells[image]
    features = datasets.Features({"id": datasets.Value("string"), "image": kind})
    return datasets.Dataset.from_dict({"id": [f"r{i}" for i in range(ROWS)], "image": values}, features=features)


def written(folder: Path, form: str, made: Any) -> str:
    if form == "parquet":
        made.to_parquet(folder / "test-00000-of-00001.parquet")
        return str(folder / "test-00000-of-00001.parquet")
    if form == "folder of parquet":
        (folder / "data").mkdir()
        for half in range(2):
            made.shard(2, half).to_parquet(folder / "data" / f"test-{half:05d}-of-00002.parquet")
        return str(folder)
    saved = datasets.DatasetDict({"test": made}) if form == "saved splits" else made
    saved.save_to_disk(folder / "saved")
    return str(folder / "saved")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are converted once into a cache of the user's; here into a folder of the test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("image", ["bytes", "struct", "list"])
@pytest.mark.parametrize("form", ["parquet", "folder of parquet", "saved", "saved splits"])
def test_an_image_is_read_from_its_row(tmp_path: Path, form: str, image: str) -> None:
    path = written(tmp_path, form, table(image))
    keys = set()
    for row in range(ROWS):
        source = ImageSource(path=path, split="test", row=row)
        assert (decode(read(source)) == noise(row, H, W)).all()
        assert probe(source, 1000) == (H, W)
        assert Images(Path(path), None, 1000).find(source, "here") == (source, H, W)
        keys.add(source_key(source))
        assert open_table(path, "test")[row]["id"] == f"r{row}"
    assert len(keys) == ROWS
    with pytest.raises(DataError, match="63 pixels, more than 62"):
        probe(ImageSource(path=path, split="test", row=0), 62)


def test_a_cell_without_an_image_and_a_row_that_is_not_one_are_named(tmp_path: Path) -> None:
    made = table().map(lambda row: row | {"image": b"no image" if row["id"] == "r2" else None})
    path = written(tmp_path, "parquet", made)
    with pytest.raises(DataError, match=r"parquet, row 1: column image holds no image"):
        probe(ImageSource(path=path, row=1), 1000)
    with pytest.raises(DataError, match=r"parquet, row 2: not a readable image"):
        probe(ImageSource(path=path, row=2), 1000)


def test_what_cannot_be_opened_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "bad.parquet", tmp_path / "empty", Path("nobody/nothing-there")):
        with pytest.raises(DataError, match=f"{path.name}: cannot be opened as a table") as caught:
            open_table(str(path))
        assert "\n" not in str(caught.value)
    splits = datasets.DatasetDict({"train": table(), "test": table()})
    splits.save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match=r"no split 'val'; set data\.options\.split to one of train, test"):
        open_table(str(tmp_path / "two"), "val")
    splits["train"].save_to_disk(tmp_path / "one")
    assert len(open_table(str(tmp_path / "one"), "whatever it is called")) == ROWS


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'relook\[datasets\]'"):
        open_table("somewhere")
