"""YOLO as Ultralytics and Roboflow write it: `data.yaml`, and `labels/.../a.txt` for `images/.../a.jpg`.

`data.train=` is the data.yaml or its folder, and `split` chooses (train); or it is one folder of images below, as
set/images/val. Rows of boxes and poses (their box) give boxes, segments and oriented boxes masks. An image without
labels is asked about only for `absent` classes: so many of those that an image lacks, always the same.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from perception.datasets import PICTURES, DataError, Records, read_text, reader
from perception.datasets.shapes import Drawn, Shape, questions
from perception.types import ImageSource

_OUTSIDE = 0.02  # share of the image by which labels leave it in practice; they are clipped


@reader("yolo")
def read(path: Path, *, split: str = "train", absent: int = 0, task: str = "segment") -> Records:
    """Every class in every image. Raises DataError where data.yaml cannot be read, or no image is found."""
    above = (folder / "data.yaml" for folder in (path, *path.absolute().parents))
    file = path if path.is_file() else next((one for one in above if one.is_file()), path / "data.yaml")
    try:
        settings = yaml.safe_load(read_text(file))
        names = settings["names"].items() if isinstance(settings["names"], dict) else enumerate(settings["names"])
        classes, poses = {int(key): str(name) for key, name in names}, bool(settings.get("kpt_shape"))
    except (yaml.YAMLError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"{file}: no names of classes can be read ({' '.join(str(error).split())}); mend it") from error
    given = settings.get(split) or [] if path in (file, file.parent) else str(path.absolute())
    root = file.parent / str(settings.get("path") or "")
    folders = [_folder(root, file.parent, str(one)) for one in (given if isinstance(given, list) else [given])]
    found = sorted(one for folder in folders for one in folder.rglob("*") if one.suffix.lower() in PICTURES)
    if not found:
        raise DataError(f"{file}: no image of {split} in {', '.join(map(str, folders)) or 'it'}; mend path or {split}")
    for image in found:
        place = os.path.relpath(image, file.parent)
        yield from questions(path, place, task, _drawn, image, classes, poses, absent=absent, relative=True)


def _folder(root: Path, beside: Path, entry: str) -> Path:
    """Roboflow writes ../train/images where train/images is meant; a `path` may be another machine's."""
    likely = (root / entry, beside / entry, beside / entry.removeprefix("../"))
    return next((one for one in likely if one.is_dir()), likely[0])


def _drawn(image: Path, classes: Mapping[int, str], poses: bool) -> Drawn:
    head, below, tail = str(image.absolute()).rpartition("/images/")
    file = Path(f"{head}/labels/{tail}" if below else image).with_suffix(".txt")
    rows = [line.partition("#")[0].split() for line in read_text(file).splitlines()] if file.is_file() else []
    shapes = [_shape(row, classes, poses, f"{file}:{number}") for number, row in enumerate(rows, start=1) if row]
    return Drawn(ImageSource(path=str(image.absolute())), shapes, labels=classes.values())


def _shape(row: Sequence[str], classes: Mapping[int, str], poses: bool, where: str) -> Shape:
    try:
        label, numbers = classes[int(row[0])], [float(one) for one in row[1:]]
        if box := poses or len(numbers) == 4:
            x, y, width, height = numbers[:4]
            numbers = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        x_and_y = [min(max(one, 0.0), 1.0) for one in numbers if -_OUTSIDE <= one <= 1 + _OUTSIDE]
        if len(x_and_y) < len(numbers):
            raise ValueError("not all are shares of the image's size")
        points = list(zip(x_and_y[::2], x_and_y[1::2], strict=True))
    except (LookupError, ValueError) as error:
        raise DataError(f"{where}: no class of data.yaml and coordinates 0 to 1 ({error!r}); mend the row") from error
    return Shape(label, "box" if box else "polygon", points)
