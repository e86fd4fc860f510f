"""COCO's JSON: `images`, `annotations`, `categories`.

As it is published (instances_val2017.json) and as CVAT and Roboflow export it, every category in an image is a question
about all its instances. With a further list `expressions` these are the questions:

    {"id": 7, "image_id": 3, "question": "the red circle", "task": "segment", "annotation_ids": [12]}

`annotation_ids` may be empty: nothing is there. An annotation's `segmentation` is a list of polygons or run-length
encoding, its `bbox` is [x, y, width, height]; either may be missing. A key `point` [x, y] inside the object is
optional; the default is the centre of the largest inscribed circle. Image names are relative to the JSON file or to
`images/` beside it. What no question needs is never read.

LVIS is COCO's form with federated truth: a category is judged in an image where it is annotated there or stands in
`neg_category_ids`; one that stands in `not_exhaustive_category_ids` is not asked for, since more of it may be there.
Images are found by the last two parts of `coco_url`: those of the validation set lie in train2017/ and in val2017/.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from perception.datasets import DataError, Record, Records, TrueObject, broken, files, read_segmentation, reader, target
from perception.datasets.categories import Frame, all_instances, ask
from perception.types import Box, Point, Target

Id = int | str


class Image(msgspec.Struct, gc=False):
    file_name: str = ""
    coco_url: str = ""  # LVIS has no file_name
    height: int | None = None
    width: int | None = None
    neg_category_ids: list[Id] | None = None  # LVIS: the only categories known to be absent,
    not_exhaustive_category_ids: list[Id] = []  # and those of which not all instances are annotated

    def described(self) -> dict[str, Any]:
        """Fields of a record."""
        size = (self.height, self.width) if self.height and self.width else None
        return {"image": self.file_name or "/".join(self.coco_url.split("/")[-2:]), "size": size}


class Annotation(msgspec.Struct, gc=False):
    """Read when the question is drawn."""

    image_id: Id | None = None
    category_id: Id | None = None
    bbox: Box | None = None
    segmentation: Any = None
    point: Point | None = None

    def object(self, label: str, *frame: *Frame, empty: bool = False) -> TrueObject:
        """Raises DataError. `empty`: its mask may be without a pixel."""
        x, y, across, down = self.bbox or (0, 0, 0, 0)
        given = self.segmentation not in (None, [])
        mask = read_segmentation(self.segmentation, *frame, empty) if given else None
        box = (x, y, x + across, y + down) if self.bbox else None
        return TrueObject(box=box, point=self.point, mask=mask, label=label)


class _Listed(msgspec.Struct, gc=False):
    """As much of an annotation as its question needs."""

    image_id: Id
    category_id: Id
    iscrowd: bool = False
    bbox: list[Any] | None = None


class Category(msgspec.Struct, gc=False):
    id: Id
    name: str


class Expression(msgspec.Struct, gc=False):
    id: Id
    image_id: Id
    question: Annotated[str, msgspec.Meta(min_length=1)]
    annotation_ids: list[Id]
    task: str = "segment"


class CocoFile(msgspec.Struct):
    """Entries stay as they stand in the file until one is needed: a file may hold a million."""

    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw]
    expressions: list[msgspec.Raw] | None = None
    categories: list[Category] = []


class _Key(msgspec.Struct, gc=False):
    id: Id


@reader("coco")
def read(
    path: Path, *, task: str = "segment", absent: int = 0, crowds: Literal["ignore", "objects"] = "ignore"
) -> Records:
    """Every expression; without any, every category in an image, and `absent` others that are not there.

    `crowds`: whether iscrowd marks pixels to ignore, as COCO means it, or objects like all others, as with CVAT.
    Raises DataError where the file is not of this form or an id stands twice.
    """
    data = files.parse(CocoFile, files.read_bytes(path), str(path))
    if data.expressions is not None:
        yield from records(data, data.expressions, path)
    else:
        yield from by_category(data, path, task, absent, crowds == "ignore")


@reader("lvis")
def read_lvis(path: Path, *, task: str = "segment", absent: int = 0) -> Records:
    """Every category in an image, and `absent` of those known not to be there; `bow_(weapon)` is "bow (weapon)"."""
    data = files.parse(CocoFile, files.read_bytes(path), str(path))
    for category in data.categories:
        category.name = category.name.replace("_", " ")
    yield from by_category(data, path, task, absent)


def records(data: CocoFile, expressions: Sequence[msgspec.Raw | Expression], path: Path) -> Records:
    """Each expression about `data`, which was read from `path`. Raises DataError where an id stands twice."""
    images, annotations = _index(data.images, "image", path), _index(data.annotations, "annotation", path)
    names = {category.id: category.name for category in data.categories}
    described = cache(lambda key: tuple(files.parse(Image, images[key], f"image {key}").described().values()))
    for number, given in enumerate(expressions, start=1):
        try:
            one = given if isinstance(given, Expression) else files.parse(Expression, given, "its form")
            if one.image_id not in images:
                raise DataError(f"expression {one.id}: no image has id {one.image_id}; add it or mend image_id")
            image, size = described(one.image_id)
        except DataError as error:
            place = f"expression {number} of the list"
            yield broken(place, DataError(f"{path}: {place}: {error}"))
            continue
        truth, place = partial(_expression_truth, one, annotations, names), f"expression {one.id}"
        yield Record(
            id=str(one.id), image=image, question=one.question, task=one.task, truth=truth, place=place, size=size
        )


def by_category(data: CocoFile, path: Path, task: str, absent: int, ignore_crowds: bool = True) -> Records:
    """A question per image and category: all its instances, or none for `absent` categories annotated elsewhere.

    A category gives no question where it is there as a crowd alone, or LVIS says that not all of it is annotated.
    Annotations whose box is of no size, or whose outline holds no pixel, are left out. What cannot be read is a broken
    record.
    """
    names = {category.id: category.name for category in data.categories}
    if not names:
        raise DataError(f"{path}: neither expressions nor categories: nothing to ask; give an instances file")
    found: dict[Id, dict[str, list[tuple[msgspec.Raw, bool]]]] = defaultdict(lambda: defaultdict(list))
    for number, raw in enumerate(data.annotations, start=1):
        place = f"annotation {number} of the list"
        try:
            one = files.parse(_Listed, raw, place)
            if one.category_id not in names:
                raise DataError(f"{place}: no category has id {one.category_id}; add it or mend category_id")
        except DataError as error:
            yield broken(place, DataError(f"{path}: {error}"))
            continue
        instances = found[one.image_id][names[one.category_id]]
        if 0 not in (one.bbox or ())[2:]:
            instances.append((raw, ignore_crowds and one.iscrowd))
    known, truth = {name for groups in found.values() for name in groups}, partial(all_instances, _object, True)
    if found and all(crowd for groups in found.values() for group in groups.values() for _, crowd in group):
        raise DataError(f"{path}: every annotation is a crowd; if they are objects, set data.options.crowds=objects")
    for key, raw in _index(data.images, "image", path).items():
        groups = found.pop(key, {})
        try:
            image = files.parse(Image, raw, f"{path}: image {key}")
        except DataError as error:
            yield broken(f"image {key}", error)
            continue
        vague = {names.get(one) for one in image.not_exhaustive_category_ids}
        here = {name: [] if name in vague else group for name, group in groups.items()}
        negative = image.neg_category_ids
        candidates = known if negative is None else {names[one] for one in negative if one in names}
        yield from ask(key, here, candidates, absent, truth, task=task, **image.described())
    for key in found:
        yield broken(f"image {key}", DataError(f"{path}: no image has id {key}, which annotations name; add it"))


def _index(entries: Sequence[msgspec.Raw], kind: str, path: Path) -> dict[Id, msgspec.Raw]:
    """Entries by id; without one, nothing can mean it, and it is left out."""
    index: dict[Id, msgspec.Raw] = {}
    decode = msgspec.json.Decoder(_Key, strict=False).decode
    for entry in entries:
        try:
            key = decode(entry).id
        except msgspec.ValidationError:
            continue
        if key in index:
            raise DataError(f"{path}: two {kind} entries have id {key}; make ids unique")
        index[key] = entry
    return index


def _expression_truth(
    expression: Expression, annotations: Mapping[Id, msgspec.Raw], names: Mapping[Any, str], *frame: *Frame
) -> Target:
    height, width, where = frame
    objects = []
    for key in expression.annotation_ids:
        place = f"{where}, annotation {key}"
        annotation = files.parse(Annotation, annotations[key], place) if key in annotations else None
        if annotation is None or annotation.image_id != expression.image_id:
            what = f"image {expression.image_id} has no annotation {key}"
            raise DataError(f"{where}: {what}; mend annotation_ids", "truth")
        objects.append(annotation.object(names.get(annotation.category_id, ""), height, width, place))
    return target(objects, *frame)


def _object(raw: msgspec.Raw, label: str, *frame: *Frame) -> TrueObject:
    return files.parse(Annotation, raw, frame[2]).object(label, *frame, empty=True)
