"""EarthReason (github.com/earth-insights/SegEarth-R1): a split's folders `images`, `labels` and `QAs`.

The three are sorted by name and belong together by POSITION, as published. A label's pixels that are not zero are the
object; a QA file {"questions": [...], "answer": [...]} with an empty answer says that nothing is there. Evaluations ask
with the first of a file's questions (`texts`).
"""

from functools import partial
from pathlib import Path

import msgspec

from perception.datasets import DataError, Records, Texts, each, files, objects, per_text, reader
from perception.images import decode
from perception.types import ImageSource, Target


class Asked(msgspec.Struct):
    questions: list[str]
    answer: list[str]


@reader("earth_reason")
def read(path: Path, *, texts: Texts = "first", task: str = "segment") -> Records:
    """The folder of a split, as train. Raises DataError where its folders do not hold equally many files."""
    pictures, labels = (files.files_in(path / name, *files.PICTURES) for name in ("images", "labels"))
    asked = files.files_in(path / "QAs", ".json", ".txt")
    if not len(pictures) == len(labels) == len(asked):
        counts = f"{len(pictures)} images, {len(labels)} labels, {len(asked)} QAs"
        raise DataError(f"{path}: {counts}, which belong together by position; copy the set again")

    def records(index: int) -> Records:
        found = files.parse(Asked, files.read_bytes(asked[index]), str(asked[index]))
        source = ImageSource(path=str(pictures[index].absolute()))
        truth, place = partial(_truth, labels[index]) if found.answer else (), asked[index].name
        return per_text(found.questions, texts, pictures[index].stem, image=source, task=task, truth=truth, place=place)

    return each(range(len(asked)), records)


def _truth(label: Path, height: int, width: int, where: str) -> Target:
    return objects.mask_target(decode(files.read_bytes(label)).max(-1) > 0, height, width, f"{where}: {label}")
