"""What a user writes to bring a task, a reward component, a data set layout and a policy loss of their own.

    python -m benchmarks.extension --json

Counted on the plugin that `tests/stack/test_cluster.py` trains with (`tests/plugin/my_perception`): per addition the
files it takes, its lines of code (no blanks, comments, docstrings), and the files of this repository that had to be
edited for it, found as those that name what it registers. Its names must be unknown before the plugin is loaded and
registered after. There is no rival in this benchmark.
"""

from __future__ import annotations

import ast
import re
import tokenize
from pathlib import Path

from benchmarks.common import options, print_result
from learner.loss import SURROGATES
from perception.datasets import READERS
from perception.registry import Registry, find_plugins
from perception.tasks import TASKS
from reward_workers.components import COMPONENTS

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "tests" / "plugin" / "my_perception"
PRODUCT = ("perception", "runtime", "rollout", "reward_workers", "learner", "launch", "synthetic", "conf")
ADDITIONS: dict[str, tuple[str, Registry, str]] = {
    "task": ("task.py", TASKS, "corners"),
    "component": ("component.py", COMPONENTS, "centre_distance"),
    "reader": ("reader.py", READERS, "piped"),
    "loss": ("loss.py", SURROGATES, "reinforce"),
}
"""What is added: its file, the registry that learns of it, and its name there."""
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
            tokenize.ENDMARKER}  # fmt: skip


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank lines, comments or bare strings."""
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type not in _NO_CODE]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    strings = (
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    )
    return len(lines - {line for node in strings for line in range(node.lineno, (node.end_lineno or 0) + 1)})


def edited(name: str) -> list[str]:
    """Files of the product that register or select this name."""
    quoted = re.compile(rf"""["'/: ]{name}["':]""")
    files = (
        file for folder in PRODUCT for file in sorted((ROOT / folder).rglob("*")) if file.suffix in (".py", ".yaml")
    )
    return [file.relative_to(ROOT).as_posix() for file in files if quoted.search(file.read_text(encoding="utf-8"))]


def main() -> None:
    arguments = options(__doc__)
    early = [name for _, registry, name in ADDITIONS.values() if name in registry]
    find_plugins([str(PLUGIN)])
    late = [name for _, registry, name in ADDITIONS.values() if name not in registry]
    if early or late:
        raise RuntimeError(f"registered without the plugin: {early}; not registered by it: {late}")
    ours = {
        addition: {"files": 1, "lines": code_lines(PLUGIN / file), "edited": len(edited(name))}
        for addition, (file, _, name) in ADDITIONS.items()
    }
    print_result("extension", ours, None, None, vars(arguments), plugin_files=len(list(PLUGIN.glob("*.py"))))


if __name__ == "__main__":
    main()
