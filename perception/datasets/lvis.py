"""LVIS: COCO's form with federated truth.

A category is judged in an image where it is annotated there or stands in `neg_category_ids`; one that stands in
`not_exhaustive_category_ids` is not asked for, since more of it may be there. Images are found by the last two parts of
`coco_url`: those of the validation set lie in train2017/ and in val2017/.
"""

from collections.abc import Iterator
from pathlib import Path

from perception.datasets import reader
from perception.datasets.coco import CocoFile, by_category
from perception.datasets.files import parse, read_bytes
from perception.datasets.records import Record


@reader("lvis")
def read(path: Path, *, task: str = "segment", absent: int = 0) -> Iterator[Record]:
    """Every category in an image, and `absent` of those known not to be there; `bow_(weapon)` is "bow (weapon)"."""
    data = parse(CocoFile, read_bytes(path), str(path))
    for category in data.categories:
        category.name = category.name.replace("_", " ")
    yield from by_category(data, path, task, absent)
