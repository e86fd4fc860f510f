"""Model card of an exported policy: where it comes from, what it was measured at, how it is asked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Template

from launch.record.summary import changes, samples
from perception.config import Config


def write_card(folder: Path, config: Config, summary: Mapping[str, Any]) -> None:
    """Write `README.md` there, from the run's settings and its summary."""
    card = Template(Path(__file__).with_suffix(".md.j2").read_text(encoding="utf-8"))
    cached = [part for part in Path(config.model.path).parts if part.startswith("models--")]
    base = cached[0].removeprefix("models--").replace("--", "/") if cached else config.model.path
    held_out, changed = samples(summary["after"]), changes(summary["before"], summary["after"])
    text = card.render(config=config, summary=summary, base=base, held_out=held_out, changes=changed)
    (folder / "README.md").write_text(text, encoding="utf-8")
