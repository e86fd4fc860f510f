"""Data sets on disk -> Samples. One reader per layout; everything that cannot be used is a DataError of one line.

    @reader("coco")
    def read(path: Path, images: Images) -> Iterator[Sample]: ...

A reader yields every question about the annotations at `path`, and raises DataError for the first that cannot be used.
Its keyword-only parameters are its options: `data.options`, checked against its signature.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from perception.config import DataConfig
from perception.datasets.files import Images
from perception.errors import DataError
from perception.images import decode
from perception.registry import Registry, check_arguments, import_all
from perception.types import Sample

READERS: Registry[Callable[..., Iterator[Sample]]] = Registry("data format")
reader = READERS.register
"""Decorator: register a reader under the name that `data.format` takes."""
_DECODED = 32  # images whose pixels are read, too: a broken copy usually breaks many


def load(config: DataConfig, split: Literal["train", "eval"], also: str | None = None) -> list[Sample]:
    """All training samples, or the first `eval_samples` held-out ones; `also` is the path of a further held-out set.

    Every annotation and image header is checked, and the pixels of the first few images. Raises DataError, and
    UserError for an unknown format or option.
    """
    path = Path(also or (config.train if split == "train" else config.eval))
    read = READERS[config.format]
    options = check_arguments(read, config.options, "data.options")
    samples: dict[str, Sample] = {}
    for sample in read(path, Images(path, config.max_pixels), **options):
        if sample.id in samples:
            raise DataError(f"{path}: two samples have the id {sample.id!r}; make ids unique")
        samples[sample.id] = sample
    if not samples:
        raise DataError(f"{path}: the data set is empty; it needs at least one question")
    found = list(samples.values())[: config.eval_samples if split == "eval" else None]
    for image in list(dict.fromkeys(sample.image_path for sample in found))[:_DECODED]:
        try:
            decode(Path(image).read_bytes())
        except DataError as error:
            raise DataError(f"{image}: the image is damaged ({error}); replace or remove it") from error
    return found


import_all(__name__)
