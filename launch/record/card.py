"""Model card of an exported policy: where it comes from, what it was measured at, how it is asked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.record.summary import changes, samples
from perception.config import Config

_CARD = """---
base_model: {config.model.path}
library_name: transformers
pipeline_tag: image-text-to-text
tags: [grpo, relook]
---
# {config.run.name}

{summary[steps]} GRPO steps from `{config.model.path}` on `{config.data.train}`, reward `{config.reward.name}`, seed \
{config.run.seed}.

| {held_out} held-out samples | before | after |
|---|---|---|
{table}

It is asked in these words (`{{question}}` is replaced), after the image:
{tasks}
"""


def write_card(folder: Path, config: Config, summary: Mapping[str, Any]) -> None:
    """Write `README.md` there, from the run's settings and its summary."""
    changed = changes(summary["before"], summary["after"])
    text = _CARD.format(
        config=config,
        summary=summary,
        held_out=samples(summary["after"]),
        table="\n".join(f"| {one.label} | {one.before:.3f} | {one.after:.3f} |" for one in changed),
        tasks="\n".join(
            f"\n{name}, system turn: {one.system}\n\n    {one.template}" for name, one in config.task.items()
        ),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
