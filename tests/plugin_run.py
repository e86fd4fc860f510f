"""Plugins for a run: the package `tests/plugin/my_perception` with data of its own, and the file that README shows."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from perception.config import DataConfig
from perception.datasets import load
from synthetic import world

PLUGIN = Path(__file__).resolve().parent / "plugin" / "my_perception"


def readme_plugin(folder: Path) -> tuple[Path, list[str]]:
    """Writes README's plugin there; returns its file and the settings that README gives beside it."""
    text = (PLUGIN.parents[2] / "README.md").read_text(encoding="utf-8")
    file = folder / "mine.py"
    file.write_text(text.split("```python\n")[1].split("```")[0], encoding="utf-8")
    command = text.split("    python -m launch.train recipe=quickstart plugins=[mine.py]")[1].split("\n\n")[0]
    return file, [word for word in shlex.split(command) if word.strip()]


def arguments(folder: Path) -> list[str]:
    """What `python` is given for two steps with the package, copied out of this repository, in `folder`/runs/mine."""
    plugin = shutil.copytree(PLUGIN, folder / "elsewhere" / "my_perception")
    world.write(folder / "world", train=16, eval=8)
    data = {split: _write_table(folder, split, count) for split, count in (("train", 8), ("eval", 4))}
    return [
        *("-m", "launch.train", "--config-dir", str(plugin / "conf"), "recipe=mine"),
        *(f"plugins=[{plugin}]", *(f"data.{split}={path}" for split, path in data.items())),
        *("algorithm.steps=2", "algorithm.prompts_per_step=4", "algorithm.group_size=4", "learner.lr=1e-3"),
        f"run.output={folder}/runs",
    ]


def _write_table(folder: Path, split: str, count: int) -> Path:
    """The first questions of the synthetic world that mean one object, in the plugin's own layout: boxes in shares."""
    source = folder / "world" / f"{split}.json"
    samples = load(DataConfig(format="coco", train=str(source), eval=str(source)), str(source))
    lines = []
    for sample in samples:
        if sample.target.count == 1:
            corners = " ".join(f"{value / sample.width:.6f}" for value in sample.target.boxes[0])
            lines.append(f"{Path(sample.image.path).relative_to(folder)}|{sample.question}?|{corners}")
    table = folder / f"{split}.txt"
    table.write_text("\n".join(lines[:count]))
    return table
