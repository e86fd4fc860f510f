"""See data before anything is trained on it, or check every record of it.

    python -m launch.data show data.format=coco data.train=train.json data.images=pictures --samples 64 --out data.html
    python -m launch.data check data.format=jsonl data.train=train.jsonl data.eval=eval.jsonl

The settings are those of `launch.train`; where no recipe is named, only the sets that are. Every question, its truth
and its image's header are read, on all cores; `check` decodes every image, too, and ends with status 2 if anything is
bad. `show` prints what was read, and writes a page with pictures of a choice by `run.seed`. Neither starts Ray or reads
a model.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from launch.run.command_line import told
from launch.run.config import settings
from perception import images, masks
from perception.datasets import Dataset, load
from perception.errors import ActorError, DataError
from perception.files import write_text
from perception.registry import find_plugins
from perception.types import ImageSource, Sample
from report.drawing import corner_and_size, data_uri, outline
from report.gallery import printable
from report.page import render

SHOWN = 10
"""Problems that are written out."""
CHUNK = 256
HEADINGS = ("set", "task", "questions", "no target", "objects", "image size")


class Seen(NamedTuple):
    """What a question was read as."""

    task: str
    objects: int | None
    """None: the truth is not whole."""
    height: int
    width: int


Found = Sequence[Seen | DataError]


def survey(name: str, dataset: Dataset, pixels: bool) -> Found:
    """Every record, read on all cores, in order; with the images' pixels if wanted. Raises ActorError."""
    global _reading
    _reading = dataset, pixels  # forked processes have it without a copy
    cores, many = len(os.sched_getaffinity(0)), len(dataset)
    with ProcessPoolExecutor(cores, mp_context=get_context("fork")) as pool:
        done = pool.map(_read, range(many), chunksize=min(CHUNK, -(-many // cores)))
        try:
            return list(track(done, f"reading {name}", total=many, console=Console(stderr=True)))
        except BrokenProcessPool as error:
            raise ActorError(f"{dataset.path}: a process that read it died, perhaps for want of memory") from error


_reading: tuple[Dataset, bool]


def _read(index: int) -> Seen | DataError:
    dataset, pixels = _reading
    try:
        one = dataset[index]
        if pixels and (size := decoded(one.image).shape[:2]) != (one.height, one.width):
            raise DataError(f"{one.image}: {size} decoded, {one.height, one.width} (height, width) by header", "size")
    except DataError as error:
        return error
    return Seen(one.task, one.target.count if "count" in one.target.known else None, one.height, one.width)


@lru_cache(maxsize=1)  # questions about one image follow one another
def decoded(source: ImageSource) -> np.ndarray:
    """(H, W, 3) uint8 RGB. Raises DataError where the image does not decode."""
    return images.decode_named(source, partial(images.read, source))


def tabulate(found: Mapping[str, Found]) -> list[tuple[str, ...]]:
    """A row of `HEADINGS` for each task of each set; spreads are smallest / median / largest."""
    rows: list[tuple[str, ...]] = []
    for name, own in found.items():
        seen = [one for one in own if isinstance(one, Seen)]
        for task in sorted({one.task for one in seen}):
            these = [one for one in seen if one.task == task]
            counts = [one.objects for one in these if one.objects is not None]
            nothing = f"{counts.count(0) / len(counts):.1%}" if counts else "unknown"
            sizes = [f"{one.width}x{one.height}" for one in sorted(these, key=lambda one: one.width * one.height)]
            rows.append((name, printable(task), f"{len(these):,}", nothing, _spread(sorted(counts)), _spread(sizes)))
    return rows


def _spread(ordered: Sequence[object]) -> str:
    if len(set(ordered)) < 2:
        return str(ordered[0]) if ordered else "unknown"
    return f"{ordered[0]} / {ordered[len(ordered) // 2]} / {ordered[-1]}"


def problems(found: Mapping[str, Found]) -> dict[str, list[str]]:
    """The first problems of each set, under a title that counts them by reason."""
    lines = {}
    for name, own in found.items():
        bad = [one for one in own if isinstance(one, DataError)]
        reasons = ", ".join(f"{reason} {many:,}" for reason, many in Counter(one.reason for one in bad).most_common())
        title = f"{name}: {len(bad):,} of {len(own):,} questions cannot be used" + (f" ({reasons})" if bad else "")
        lines[title] = [printable(str(one)) for one in bad[:SHOWN]]
    return lines


def draw(dataset: Dataset, samples: int, seed: int) -> Iterator[tuple[Sample | None, str]]:
    """A choice of so many records, in the order of the data: a sample and its picture, or None and what is wrong."""
    for index in sorted(np.random.default_rng(seed).permutation(len(dataset))[:samples].tolist()):
        try:
            sample = dataset[index]
            yield sample, data_uri(decoded(sample.image))
        except DataError as error:
            yield None, str(error)


def page(rows: Sequence[Sequence[str]], bad: Mapping[str, Sequence[str]], drawn: Mapping[str, Sequence]) -> str:
    """A self-contained page of the table, the problems and what was drawn of each set."""
    make = {"text": printable, "rectangles": corner_and_size, "path": lambda rle: outline(masks.decode(rle))}
    return render("data.html.j2", headings=HEADINGS, rows=rows, problems=bad, sets=drawn, **make)


def main(words: Sequence[str] | None = None) -> None:
    """Raises SystemExit: 0, or 2 where settings or, in `check`, any record cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m launch.data", description="See or check data sets.")
    parser.add_argument("action", choices=("show", "check"))
    parser.add_argument("settings", nargs="*", help="as for launch.train: data.format=coco data.train=train.json")
    parser.add_argument("--samples", type=int, default=64, help="questions of each set on the page of `show`")
    parser.add_argument("--out", type=Path, default=Path("data.html"), help="the page of `show`")
    given, console = parser.parse_intermixed_args(words), Console()
    with told():
        config = settings(given.settings)
        find_plugins(config.plugins)
        paths = {"train": config.data.train, "eval": config.data.eval, **config.data.also}
        sets = {name: load(config.data, path, held_out=name != "train") for name, path in paths.items() if path}
        found = {name: survey(name, one, pixels=given.action == "check") for name, one in sets.items()}
        bad, rows = problems(found), tabulate(found)
        if given.action == "show":
            table = Table(*HEADINGS, caption="objects, image size: smallest / median / largest")
            for row in rows:
                table.add_row(*map(Text, row))
            console.print(table)
        for title, lines in bad.items():
            console.print("\n  ".join((title, *lines)), markup=False, highlight=False, soft_wrap=True)
        if given.action == "check":
            sys.exit(2 if any(bad.values()) else 0)
        drawn = {name: list(draw(one, given.samples, config.run.seed)) for name, one in sets.items()}
        write_text(given.out, page(rows, bad, drawn))
        console.print(f"page: {given.out}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
