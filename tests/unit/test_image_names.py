"""Guards how the images of a data set are found: names as other systems write them, images that stand in the text."""

from __future__ import annotations

import base64
import unicodedata
from pathlib import Path

import pytest

from perception.datasets.files import Images
from perception.errors import DataError
from perception.images import read
from tests.builders import noise, png

H, W = 20, 30
PICTURE = png(noise(0, H, W))
ENCODED = base64.b64encode(PICTURE).decode()


def find(folder: Path, name: str) -> bytes:
    """The bytes of the image that is found."""
    source, height, width = Images(folder / "labels.jsonl", None, 1000).find(name, "labels.jsonl: line 3")
    assert (height, width) == (H, W)
    return read(source)


@pytest.mark.parametrize("place", ["", "images"])
@pytest.mark.parametrize(
    ("stored", "named"),
    [
        ("train/a.png", "train/a.png"),
        ("train/a.png", "train\\a.png"),
        ("train/a.png", ".\\train\\a.png"),
        ("train\\a.png", "train\\a.png"),  # a name with a backslash in it, as it may be here
        *[
            (unicodedata.normalize(stored, "Übung/naïve.png"), unicodedata.normalize(named, "Übung/naïve.png"))
            for stored in ("NFC", "NFD")
            for named in ("NFC", "NFD")
        ],
    ],
)
def test_a_name_is_found_as_any_system_writes_it(tmp_path: Path, place: str, stored: str, named: str) -> None:
    path = tmp_path / place / stored
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PICTURE)
    assert find(tmp_path, named) == PICTURE


@pytest.mark.parametrize("text", [f"data:image/png;base64,{ENCODED}", ENCODED, "\n".join([ENCODED[:76], ENCODED[76:]])])
def test_an_image_may_stand_in_the_text(tmp_path: Path, text: str) -> None:
    assert find(tmp_path, text) == PICTURE


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "https://bucket.s3.host/a.png?signature=secret",
            "https://bucket.s3.host/a.png is an address; download it first",
        ),
        ("s3://bucket/a.png", "s3://bucket/a.png is an address; download it first"),
        ("data:image/png;base64,????", "no file name and no base64"),
        ("?" * 5000, "no file name and no base64"),
        (base64.b64encode(b"no image" * 500).decode(), "line 3: not a readable image"),
        ("nowhere.png", "no image nowhere.png in .* or .*images; mend the path, add the file, or set data.images"),
        ("n" * 300 + ".png", "no image nnn"),
        ("a\0b.png", "no image"),
        ("", "no image"),
    ],
)
def test_what_is_no_image_is_one_line(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        find(tmp_path, name)
    message = str(caught.value)
    assert message.startswith("labels.jsonl: line 3: ") and "\n" not in message and "secret" not in message
    assert len(message) < 600 and caught.value.reason == "image"
