"""Pages: templates of this package, rendered with everything that came from outside escaped."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def asset(name: str) -> str:
    """A file of this package."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """A template of this package, filled in; a page's policy lets the one script run by its hash."""
    here, script = FileSystemLoader(Path(__file__).parent), asset("report.js")
    pages = Environment(loader=here, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    checksum = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return pages.get_template(template).render(values, style=asset("report.css"), script=script, script_hash=checksum)
