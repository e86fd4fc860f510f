"""Reading: the text in the image, as it stands there.

All of the completion, or its answer block where it opens one, without code fences. `[]` says that there is nothing to
read. Perception-R1's code has no such task; its evaluation and its predecessor MMR1 take all of the completion.
"""

from perception.frames import Frame
from perception.grammar import LONGEST, clean
from perception.tasks import task
from perception.tasks.detect import Bare
from perception.tasks.objects import unparsed
from perception.types import Answer, Target


@task("ocr")
class Ocr(Bare):
    metrics = ("perception_r1_ocr",)

    def parse(self, text: str) -> Answer:
        """UNPARSED where nothing was written, an answer block is not closed, or the text is beyond `LONGEST`."""
        said = (self.body(text) or "").strip()
        if not 0 < len(said) <= LONGEST:
            return unparsed("no text in the completion, or one too long to be read")
        return Answer(objects=(), text="" if said == "[]" else clean(said))

    def write(self, target: Target, frame: Frame, inline: bool = False) -> str:
        return self.framed(target.text or "[]", target, frame, inline)
