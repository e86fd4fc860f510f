"""Records: questions as a reader lists them, before anything of them is read or checked."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import msgspec

from perception.datasets.objects import TrueObject
from perception.errors import DataError
from perception.types import ImageSource, Target

Texts = Literal["first", "all"]
"""Which of several texts about one thing are asked: the first, or each."""
Truth = Sequence[TrueObject] | Callable[[int, int, str], Target]
"""All true objects; or (height, width) of the image and the beginning of messages -> truth, raising DataError."""


class Record(msgspec.Struct, kw_only=True, gc=False):
    """One question about one image. A data set holds hundreds of thousands: nothing costly is done to make one."""

    id: str
    """Unique inside the data set."""
    image: ImageSource | str
    """A file as the annotations name it, which `Images.find` looks for when the question is drawn; or a source."""
    question: str
    task: str
    truth: Truth
    place: str
    """Where it stands, for messages: line 12, expression 7."""
    size: tuple[int, int] | None = None
    """(height, width) that the annotations state; the image must have them."""
    fault: DataError | None = None
    """Why it cannot be used, where that shows while it is listed."""


Records = Iterator[Record]
"""What a reader gives."""


def broken(place: str, fault: DataError) -> Record:
    """A record that cannot even be listed: it is refused, or counted and left out, when it is drawn."""
    return Record(id=place, image="", question="", task="", truth=(), place=place, fault=fault)


def each(things: Iterable[Any], records: Callable[[Any], Records]) -> Records:
    """The records of every thing, as a file; one that raises DataError is a broken record."""
    for thing in things:
        try:
            yield from records(thing)
        except DataError as error:
            yield broken(str(thing), error)


def per_text(texts: Sequence[str], which: Texts, name: str, **shared: Any) -> Records:
    """A record per text, or for the first. `name` and the text's number make its id, `shared` are its other fields."""
    for index, text in enumerate(texts[: None if which == "all" else 1]):
        yield Record(id=f"{name}:{index}", question=text, **shared)
