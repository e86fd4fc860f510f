"""Data sets on disk -> Samples. One reader per layout; what cannot be used is a DataError of one line.

    from perception.datasets import DataError, Record, Records, reader

    @reader("jsonl")
    def read(path: Path, *, option: int = 3) -> Records: ...

A reader lists the questions at `path` and raises DataError where its files cannot be read at all. What is asked of one
question - image, truth - is read and checked when the question is drawn: start-up does not grow with the data, and one
bad record is one bad record. The keyword-only parameters are `data.options`, checked against the signature.
"""

import atexit
import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

from perception.config import DataConfig
from perception.datasets.files import PICTURES, Images, files_in, find_file, parse, read_bytes, read_text
from perception.datasets.objects import TrueObject, mask_target, read_segmentation, target
from perception.datasets.records import Record, Records, Texts, broken, each, per_text
from perception.errors import DataError, SkippedRecordError
from perception.grammar import MAX_OBJECTS, clean
from perception.registry import Registry, check_arguments, import_all, keyword_only
from perception.types import Sample

READERS: Registry[Callable[..., Records]] = Registry("data format")
reader = READERS.register
"""Decorator: register a reader under the name that `data.format` takes."""
atexit.register(gc.unfreeze)  # what was frozen with the records below is freed when the program ends


def stated(config: DataConfig) -> str:
    """What the held-out sets were read as, which goes with every figure: reason_seg, ignore=drop, texts=first, ..."""
    used = _options(config, held_out=True)
    return ", ".join([config.format, *(f"{name}={value}" for name, value in used.items() if value != "")])


def _options(config: DataConfig, held_out: bool) -> dict[str, Any]:
    """Every option of the reader as it is used, defaults included. Raises UserError for an unknown one."""
    read = READERS[config.format]
    changed = config.eval_options if held_out else {}
    defaults = {name: one.default for name, one in keyword_only(read).items()}
    where = "data.eval_options" if changed else "data.options"
    return defaults | check_arguments(read, config.options | changed, where)


def load(config: DataConfig, path: str, held_out: bool = False) -> "Dataset":
    """The data set at `path`. Raises DataError where it cannot be listed, UserError for an unknown format or option."""
    records = READERS[config.format](Path(path), **_options(config, held_out))
    images = Images(Path(path), config.images, config.refuse_pixels)
    return Dataset(path, records, images, skip=config.on_bad_record == "skip")


class Dataset(Sequence[Sample]):
    """The samples of a data set. Each is read and checked when it is asked for, by its index."""

    def __init__(self, path: str, records: Iterable[Record], images: Images, skip: bool = False) -> None:
        """Raises DataError where there is no record, or two have one id."""
        gc.disable()  # nothing is freed while listing: to look for it would take most of the time, then and ever after
        try:
            self.records = list(records)
        finally:
            gc.freeze()
            gc.enable()
        self.path, self._images, self._skip = path, images, skip
        self.check: Callable[[Sample], None] = lambda sample: None
        """A further check of every sample; raises DataError without naming the sample."""
        self.bad: dict[str, DataError] = {}
        """What could not be used, by id."""
        if not self.records:
            raise DataError(f"{path}: the data set is empty; it needs at least one question")
        if len(ids := {record.id for record in self.records}) < len(self.records):
            twice = next(name for name, n in Counter(record.id for record in self.records).items() if n > 1)
            many = f"{len(self.records) - len(ids)} ids are there more than once"
            raise DataError(f"{path}: two samples have the id {twice!r} ({many}); make ids unique")

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """Raises DataError for a record that cannot be used: SkippedRecordError where such are left out. A slice holds
        so many samples that can be used, from its start on."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            return list(islice(self.usable(start), stop - start))
        record = self.records[index]
        try:
            return self._read(record)
        except DataError as error:
            self.bad[record.id] = error
            if self._skip:
                raise SkippedRecordError(str(error), error.reason) from error
            raise

    def usable(self, start: int = 0) -> Iterator[Sample]:
        """Samples in order, without those that are left out. Raises DataError for a record that ends the run."""
        for index in range(start, len(self)):
            try:
                yield self[index]
            except SkippedRecordError:
                continue

    @property
    def skipped(self) -> dict[str, int]:
        """Records left out so far, by reason."""
        return dict(Counter(error.reason for error in self.bad.values())) if self._skip else {}

    def _read(self, record: Record) -> Sample:
        if record.fault is not None:
            raise record.fault
        where = f"{self.path}: {record.place}"
        source, height, width = self._images.find(record.image, where)
        if record.size and record.size != (height, width):
            given = f"{record.size[1]}x{record.size[0]}"
            why = "its EXIF orientation was ignored" if record.size == (width, height) else "one of them was resized"
            raise DataError(f"{where}: {source} is {width}x{height} but the annotations say {given}: {why}", "size")
        truth = record.truth
        true = truth(height, width, where) if callable(truth) else target(truth, height, width, where)
        asked = {"id": clean(record.id), "question": clean(record.question), "task": record.task}
        sample = Sample(image=source, height=height, width=width, target=true, **asked)
        try:
            if (count := sample.target.count) > MAX_OBJECTS:
                raise DataError(f"{count} objects, more than the {MAX_OBJECTS} of an answer; ask for fewer", "truth")
            self.check(sample)
        except DataError as error:
            raise DataError(f"{where}: {error}", error.reason) from error
        return sample


import_all(__name__)
