"""Guards the writer of COCO files with expressions: what it writes is what the reader reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from perception import masks
from perception.datasets.objects import TrueObject
from synthetic import coco_writer
from tests.builders import dataset, noise, png, rectangle

H, W = 20, 30


def record(seed: int) -> coco_writer.Scene:
    rng = np.random.default_rng(seed)
    boxes = [(int(x), int(y), int(x) + 6, int(y) + 5) for x, y in rng.integers(0, 14, (seed % 3, 2))]
    shapes = [masks.encode(rectangle(*box, H, W)) for box in boxes]
    return coco_writer.Scene(
        image=png(noise(rng, H, W)),
        height=H,
        width=W,
        question=f"thing {seed}",
        task="count" if seed % 2 else "segment",
        objects=[
            TrueObject(box=box, point=masks.extent(masks.decode(shape))[1], mask=shape, label="thing")
            for box, shape in zip(boxes, shapes, strict=True)
        ],
    )


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "data" / "train.json"
    records = [record(seed) for seed in range(7)]
    assert coco_writer.write(path, iter(records)) == 7
    samples = dataset(path)
    assert [sample.id for sample in samples] == [str(i) for i in range(1, 8)]
    for written, sample in zip(records, samples, strict=True):
        assert (sample.question, sample.task) == (written.question, written.task)
        assert Path(sample.image.path).read_bytes() == written.image
        assert sample.target.boxes.tolist() == [list(item.box or ()) for item in written.objects]
        assert sample.target.points.tolist() == [list(item.point or ()) for item in written.objects]
        assert sample.target.masks == tuple(item.mask for item in written.objects)
    again = dataset(path)
    for one, other in zip(samples, again, strict=True):
        assert np.array_equal(one.target.boxes, other.target.boxes)
        assert np.array_equal(one.target.points, other.target.points)
        assert one.target.masks == other.target.masks


def test_a_broken_off_write_leaves_no_annotations(tmp_path: Path) -> None:
    def broken() -> Any:
        yield record(1)
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        coco_writer.write(tmp_path / "train.json", broken())
    assert not (tmp_path / "train.json").exists()


def test_the_point_inside_a_mask_is_the_centre_of_its_largest_circle() -> None:
    mask = rectangle(0, 0, 30, 2, H, W) | rectangle(10, 0, 19, 9, H, W)  # a thin bar with a 9x9 block
    for precision in (cv2.DIST_MASK_3, cv2.DIST_MASK_PRECISE):
        assert masks.extent(mask, precision) == ((0, 0, 30, 9), (14, 4))
