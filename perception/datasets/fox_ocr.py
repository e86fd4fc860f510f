r"""Pages to be read, Fox benchmark: `en_page_ocr.json`, `cn_page_ocr.json`; pictures in `en_pdf_png`, `cn_pdf_png`.

    {"image": "en_1.png", "conversations": [{"from": "human", "value": "<image>\nOCR this image: "},
                                            {"from": "gpt", "value": "the page's text"}]}

The truth is a text alone; `task` names the task of a plugin that asks for one.
"""

from functools import partial
from pathlib import Path

import msgspec

from perception.datasets import Record, Records, files, objects, reader


class Said(msgspec.Struct):
    value: str


class Page(msgspec.Struct):
    image: str
    conversations: tuple[Said, Said]


@reader("fox_ocr")
def read(path: Path, *, task: str = "ocr") -> Records:
    """Every page. Raises DataError where the file is not of this form."""
    for page in files.parse(list[Page], files.read_bytes(path), str(path)):
        asked, text = (said.value for said in page.conversations)
        question, name = asked.removeprefix("<image>").strip(), page.image
        truth = partial(objects.target, (), text=text, complete=False)
        image = f"{path.name[:2]}_pdf_png/{name}"
        yield Record(id=name, image=image, question=question, task=task, truth=truth, place=f"page {name}")
