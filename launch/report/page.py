"""Pages: templates of this package, rendered with everything that came from outside escaped."""

from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template


def asset(name: str) -> str:
    """A file of this package."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """A template of this package, filled in."""
    made = Template(asset(template), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return made.render(style=asset("report.css"), **values)
