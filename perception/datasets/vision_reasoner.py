"""Tables of Seg-Zero and VisionReasoner (github.com/dvlab-research/Seg-Zero), told apart by their columns.

Training: `problem`, and `solution` or `answer` as text, in either form:

    [{"bbox_2d": [84, 210, 251, 402], "point_2d": [160, 300]}, ...]
    <box>(84,210),(251,402)</box><points>(160,300),(140,251)</points>

The numbers are pixels of the stored picture, which was squeezed to 840x840 (`img_height` and `img_width` are its size
before). A box ends with the LAST column and row of its object, so that one is added to both. The older form is of one
object; its second point, a further one in that object, is left out.

Evaluation: `text`, and as truth `mask` (rows of booleans, all false: nothing is there), else `count` (all that is
known) or `bbox` (x1 y1 x2 y2, one or a list). In their ReasonSeg tables the regions that annotators wanted ignored are
part of the target; the reader `reason_seg` leaves the choice.
"""

import re
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from perception import tables
from perception.datasets import DataError, Record, Records, files, objects, reader
from perception.types import Box, ImageSource, Point, Target

_OLD = re.compile(r"\s*<box>\((\d+),(\d+)\),\((\d+),(\d+)\)</box>\s*<points>\((\d+),(\d+)\).*", re.DOTALL)
_NEW = r'[{"bbox_2d": [\1, \2, \3, \4], "point_2d": [\5, \6]}]'


class Solved(msgspec.Struct):
    bbox_2d: Box
    point_2d: Point | None = None

    def object(self) -> objects.TrueObject:
        x1, y1, x2, y2 = self.bbox_2d
        return objects.TrueObject(box=(x1, y1, x2 + 1, y2 + 1), point=self.point_2d)


@reader("vision_reasoner")
def read(path: Path, *, split: str = "", task: str = "segment") -> Records:
    """Every row of a parquet file, a saved data set or a hub id. Raises DataError where it has no question."""
    for source, cells in tables.rows(path, split, "problem", "text"):
        place, (question, *_) = f"row {source.row}", cells.values()
        truth = partial(_truth, source)
        yield Record(id=place, image=source, question=question or "", task=task, truth=truth, place=place)


def _truth(source: ImageSource, height: int, width: int, where: str) -> Target:
    row = tables.open_table(source.path, source.split)[source.row]
    if (mask := row.get("mask")) is not None:
        objects.check_mask_size((len(mask), *{len(line) for line in mask}), height, width, where)
        return objects.mask_target(np.array(mask, bool), height, width, where)
    if row.get("count") is not None:
        return objects.target((), height, width, where, number=row["count"])
    if (given := row.get("bbox")) is not None:
        nested = given if not given or isinstance(given[0], list) else [given]
        boxes = files.parse(list[Box], msgspec.json.encode(nested), where)
        return objects.target([objects.TrueObject(box=box) for box in boxes], height, width, where)
    solution = row.get("solution", row.get("answer"))
    if not isinstance(solution, str):
        raise DataError(f"{where}: no text solution or answer, no mask, bbox or count", "truth")
    solved = files.parse(list[Solved], _OLD.sub(_NEW, solution), where)
    return objects.target([one.object() for one in solved], height, width, where)
