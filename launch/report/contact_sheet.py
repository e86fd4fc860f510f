"""Contact sheet of data sets: questions with their image and truth, drawn as they were read."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

from launch.report.drawing import corner_and_size, data_uri, mask_of, outline
from launch.report.gallery import printable
from launch.report.page import render
from perception import images
from perception.errors import DataError
from perception.types import Rle, Sample

Card = SimpleNamespace
"""A sample made drawable: printable texts, SVG paths, boxes as (x, y, width, height); or only its `problem`."""


def contact_sheet(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    problems: Mapping[str, Sequence[str]],
    drawn: Mapping[str, Sequence[Sample | DataError]],
) -> str:
    """A self-contained page: the table, the problems by their title, and by data set what is drawn of it.

    What comes from the data is shown as text alone.
    """
    return render(
        "contact_sheet.html.j2",
        headings=headings,
        rows=rows,
        problems=problems,
        sets={name: [_card(one) for one in samples] for name, samples in drawn.items()},
    )


def _card(sample: Sample | DataError) -> Card:
    if isinstance(sample, DataError):
        return Card(problem=printable(str(sample)))
    try:
        image = data_uri(images.decode(images.read(sample.image)))
    except (DataError, OSError) as error:
        return Card(problem=printable(f"{sample.image}: the image is damaged ({error})"))
    target = sample.target
    return Card(
        problem=None,
        image=image,
        height=sample.height,
        width=sample.width,
        source=printable(str(sample.image)),
        **{name: printable(getattr(sample, name)) for name in ("id", "task", "question")},
        boxes=corner_and_size(target.boxes.tolist()),
        points=target.points.tolist(),
        masks=[_path(mask) for mask in target.masks],
        ignore=_path(target.ignore) if target.ignore else "",
        labels=printable(", ".join(dict.fromkeys(filter(None, target.labels)))),
        text=None if target.text is None else printable(target.text),
        count=target.count if target.complete else None,
    )


def _path(mask: Rle) -> str:
    return outline(mask_of(mask.counts.decode("ascii"), mask.height, mask.width))
