"""LVIS: COCO's form with federated truth.

A category is judged in an image where it is annotated there or stands in `neg_category_ids`; one that stands in
`not_exhaustive_category_ids` is not asked for, since more of it may be there. Images are found by the last two parts of
`coco_url`: those of the validation set lie in train2017/ and in val2017/.
"""

from pathlib import Path

from perception.datasets import Records, coco, files, reader


@reader("lvis")
def read(path: Path, *, task: str = "segment", absent: int = 0) -> Records:
    """Every category in an image, and `absent` of those known not to be there; `bow_(weapon)` is "bow (weapon)"."""
    data = files.parse(coco.CocoFile, files.read_bytes(path), str(path))
    for category in data.categories:
        category.name = category.name.replace("_", " ")
    yield from coco.by_category(data, path, task, absent)
