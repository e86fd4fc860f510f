"""Data sets on disk -> Samples. One reader per format; everything that cannot be used is a DataError of one line."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from perception.config import DataConfig
from perception.datasets import coco, jsonl
from perception.errors import DataError
from perception.images import decode
from perception.tasks import TASKS
from perception.types import Sample

_READERS = {"coco": coco.read, "jsonl": jsonl.read}
_DECODED = 32  # images whose pixels are read, too: a broken copy usually breaks many


def load(config: DataConfig, split: Literal["train", "eval"], also: str | None = None) -> list[Sample]:
    """All training samples, or the first `eval_samples` held-out ones; `also` is the path of a further held-out set.

    Every annotation and image header is checked, and the pixels of the first few images. Raises DataError.
    """
    path = Path(also or (config.train if split == "train" else config.eval))
    samples = _READERS[config.format](path, config.max_pixels)
    if not samples:
        raise DataError(f"{path}: the data set is empty; it needs at least one question")
    if split == "eval":
        samples = samples[: config.eval_samples]
        for sample in samples:
            if TASKS[sample.task].needs_masks and len(sample.target.masks) < sample.target.count:
                raise DataError(
                    f"{path}: sample {sample.id}: task {sample.task} is evaluated by masks and this one has none; "
                    "add masks, or use task ground"
                )
    for image in list(dict.fromkeys(sample.image_path for sample in samples))[:_DECODED]:
        try:
            decode(Path(image).read_bytes())
        except DataError as error:
            raise DataError(f"{image}: the image is damaged ({error}); replace or remove it") from error
    return samples
