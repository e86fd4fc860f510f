"""Guards what runs that start at once prepare together: everybody's world and policy are whole, and nobody's is pulled
from under a reader."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from perception.config import Config, DataConfig
from perception.datasets import load
from perception.errors import UserError
from perception.files import replacing, write_text
from synthetic import prepare as preparing
from synthetic import world
from tests import builders

RUNS = 4


def settings(out: Path) -> Config:
    data = DataConfig(
        format="coco", train=str(out / "train.json"), eval=str(out / "eval.json"), world_side=64, world_train=3
    )
    return builders.config(data=data)


def prepare(out: Path) -> list[str]:
    """What it said."""
    said: list[str] = []
    preparing.prepare(settings(out), said.append)
    return said


def read(out: Path) -> list[str]:
    """Every question of the world, its image found and probed."""
    data = settings(out).data
    return [sample.question for split in (data.train, data.eval) for sample in load(data, split)]


def small(write: Callable[..., None]) -> Callable[..., None]:
    return lambda folder, **sizes: write(folder, **sizes, eval=2)


def test_threads_that_prepare_at_once_have_one_whole_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are writing at the same time before any may end."""
    together, out, write = threading.Barrier(RUNS, timeout=60), tmp_path / "world", small(world.write)

    def slowly(folder: Path, **sizes: int) -> None:
        together.wait()
        write(folder, **sizes)
        together.wait()

    monkeypatch.setattr(world, "write", slowly)
    with ThreadPoolExecutor(RUNS) as threads:
        assert all(threads.map(prepare, [out] * RUNS))
    assert len(read(out)) == 3 + 2
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


def test_the_winners_world_stays_under_those_who_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, write = tmp_path / "world", small(world.write)
    kept: list[int] = []

    def overtaken(folder: Path, **sizes: int) -> None:
        monkeypatch.setattr(world, "write", write)
        prepare(out)
        kept.append((out / "train.json").stat().st_ino)
        write(folder, **sizes)

    monkeypatch.setattr(world, "write", overtaken)
    prepare(out)
    assert kept == [(out / "train.json").stat().st_ino]
    assert prepare(out) == []


def test_threads_that_write_one_file_leave_one_whole_text(tmp_path: Path) -> None:
    start, texts = threading.Barrier(RUNS, timeout=60), {mark * 50_000 for mark in "abcd"}

    def write(text: str) -> None:
        start.wait()
        for _ in range(100):
            write_text(tmp_path / "f.json", text)
            assert (tmp_path / "f.json").read_text() in texts

    with ThreadPoolExecutor(RUNS) as threads:
        list(threads.map(write, texts))
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]


@pytest.mark.parametrize("shared", [True, False])
def test_a_write_that_breaks_off_leaves_what_was_there(tmp_path: Path, shared: bool) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").touch()

    def write() -> None:
        with replacing(tmp_path / "d", shared) as folder:
            folder.mkdir()
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="full"):
        write()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["d", "d/old"]


def test_a_folder_of_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files; remove them, or name another folder"):
        prepare(tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "write", small(world.write))
    prepare(tmp_path)
    assert len(read(tmp_path)) == 5
