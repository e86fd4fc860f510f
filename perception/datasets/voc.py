"""Pascal VOC: `Annotations/NAME.xml` and `JPEGImages/`, or XML files beside their images. Boxes alone are read.

A box counts pixels from 1 and includes its last. `split` takes the names of `ImageSets/Main/SPLIT.txt`.
"""

from pathlib import Path

from perception.datasets import Records, files_in, read_text, reader
from perception.datasets.shapes import Drawn, Shape, questions, read_xml


@reader("voc")
def read(path: Path, *, split: str = "", task: str = "segment") -> Records:
    """Every label of every file. Raises DataError where there is none."""
    root = path.parent if path.name == "Annotations" else path
    folder = root / "Annotations" if (root / "Annotations").is_dir() else root
    lines = read_text(root / "ImageSets" / "Main" / f"{split}.txt").splitlines() if split else []
    names = [line.split()[0] for line in lines if line.strip()] or [file.stem for file in files_in(folder, ".xml")]
    for name in names:
        yield from questions(path, name, task, _drawn, folder / f"{name}.xml", root / "JPEGImages")


def _drawn(file: Path, pictures: Path) -> Drawn:
    root, shapes = read_xml(file), []
    for one in root.iter("object"):
        x1, y1, x2, y2 = (float(one.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax"))
        shapes.append(Shape(one.findtext("name", "").strip(), "box", [(x1 - 1, y1 - 1), (x2, y2)]))
    name = root.findtext("filename", "").strip()
    image = str(pictures.absolute() / name) if pictures.is_dir() else name
    return Drawn(image, shapes, (int(root.findtext("size/height", "0")), int(root.findtext("size/width", "0"))))
