"""Guards the plan of the house: who may import whom, heavy libraries at home, nothing local in tracked files."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (
    "benchmarks",
    "hydra_plugins",
    "launch",
    "learner",
    "perception",
    "report",
    "reward_workers",
    "rollout",
    "runtime",
    "setup_env",
    "synthetic",
)

MAY_IMPORT = {
    "perception": {"perception"},
    "setup_env": {"setup_env"},
    "runtime": {"runtime", "perception"},
    "rollout": {"rollout", "runtime", "perception"},
    "reward_workers": {"reward_workers", "runtime", "perception"},
    "learner": {"learner", "runtime", "perception"},
    "report": {"report", "launch", "perception"},
    "launch": set(ROOMS) - {"benchmarks", "hydra_plugins"},
    "hydra_plugins": {"hydra_plugins", "launch", "report", "runtime", "perception"},
    "synthetic": set(ROOMS) - {"benchmarks", "hydra_plugins"},
    "benchmarks": set(ROOMS),
}
PERCEPTION_LIBRARIES = {"PIL", "annotated_types", "cachetools", "cv2", "msgspec", "numpy", "pycocotools", "pydantic"}
PERCEPTION_LIBRARIES |= {"scipy", "yaml"}
ONLY_IN = {
    "vllm": {"rollout/engine.py", "rollout/worker_extension.py"},
    "sam2": {"reward_workers/segmenter.py"},
    "deepspeed": {"learner/zero.py"},
    "datasets": {"perception/tables.py"},
}
# A benchmark may drive a library directly: that is the rival.
RIVALS = {"vllm": {"benchmarks/rollout.py"}, "datasets": {"benchmarks/step_sides.py", "benchmarks/trl_step.py"}}


def tracked(folder: Path = ROOT) -> Iterator[Path]:
    """Every file that .gitignore does not name: its patterns are names, or folders of the root."""
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line]
    for path in folder.iterdir():
        name = f"/{path.name}" if folder == ROOT else path.name
        if path.name == ".git" or any(fnmatch(path.name, one) or fnmatch(name, one) for one in ignored):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from tracked(path)
        elif path.is_file():
            yield path


def imported(path: Path) -> set[str]:
    """Top-level names of every module imported anywhere in the file, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # A relative import stays in its own room.
            found.add(node.module.split(".")[0] if node.module and not node.level else path.relative_to(ROOT).parts[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"importlib.import_module", "__import__"}:
            found |= {str(arg.value).split(".")[0] for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return found


MODULES = {
    path.relative_to(ROOT).as_posix(): imported(path) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))
}


def test_the_walk_sees_imports_inside_functions(tmp_path: Path) -> None:
    assert "torch" in MODULES["runtime/cluster.py"]  # imported in a function there
    assert {room for name in MODULES for room in ROOMS if name.startswith(room)} >= {"launch", "perception"}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room: str) -> None:
    strangers = set(ROOMS) - MAY_IMPORT[room] | ({"tests"} if room != "benchmarks" else set())
    broken = {name: names & strangers for name, names in MODULES.items() if name.startswith(f"{room}/")}
    assert {name: names for name, names in broken.items() if names} == {}


def test_benchmarks_take_from_the_tests_their_builders_alone() -> None:
    taken = set()
    for path in (ROOT / "benchmarks").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "tests":
                taken |= {f"tests.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
                taken.add(node.module)
            elif isinstance(node, ast.Import):
                taken |= {alias.name for alias in node.names if alias.name.split(".")[0] == "tests"}
    assert taken == {"tests.builders"}
    light = {"perception", "reward_workers", "synthetic", "cv2", "numpy"} | set(sys.stdlib_module_names)
    assert imported(ROOT / "tests" / "builders.py") <= light


def test_perception_stays_light() -> None:
    allowed = PERCEPTION_LIBRARIES | {"perception"} | set(sys.stdlib_module_names)
    heavy = {name: names - allowed for name, names in MODULES.items() if name.startswith("perception/")}
    assert {name: names for name, names in heavy.items() if names} == {"perception/tables.py": {"datasets"}}
    tables = ast.parse((ROOT / "perception" / "tables.py").read_text())
    loaded = {alias.name for node in tables.body if isinstance(node, ast.Import) for alias in node.names}
    assert "datasets" not in loaded  # an extra, and seconds of imports: only where a table is opened


@pytest.mark.parametrize("library", ONLY_IN)
def test_heavy_libraries_have_one_home(library: str) -> None:
    users = {name for name, names in MODULES.items() if library in names}
    assert users - RIVALS.get(library, set()) <= ONLY_IN[library]


def test_every_import_is_a_declared_dependency() -> None:
    """What happens to be installed here must also be there after `make setup` on a fresh machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for lines in project["optional-dependencies"].values() for line in lines]
    declared = {re.split(r"[\[=<>~! ]", line)[0].lower().replace("_", "-") for line in lines}
    provides = packages_distributions()
    undeclared = {}
    for name, names in MODULES.items():
        for library in names - set(sys.stdlib_module_names) - set(ROOMS) - {"tests"}:
            packages = {package.lower().replace("_", "-") for package in provides.get(library, [library])}
            if not packages & declared:
                undeclared[name] = library
    assert undeclared == {}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_constraints_are_exact_and_cover_the_dependencies(kind: str) -> None:
    lines = [line for line in (ROOT / f"constraints/{kind}.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][A-Za-z0-9.]*", line)] == []
    pinned = {line.split("==")[0] for line in lines}
    assert len(pinned) == len(lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + project["optional-dependencies"][kind] + project["optional-dependencies"]["dev"]
    assert {re.split(r"[\[=]", line)[0] for line in asked} - pinned == set()


# Assembled, so that this file does not match itself.
LOCAL = re.compile("|".join(["/" + "work/", "/" + r"root/", "/" + r"home/\w", "--" + "index-url", "--" + "find-links",
                             "pypi" + r"\.org", "pythonhosted" + r"\.org", "download" + r"\.pytorch"]))  # fmt: skip
TEXT = {"", ".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".sh", ".cfg", ".cpu", ".cuda", ".pth"}


def test_no_machine_path_and_no_registry_host() -> None:
    found = {}
    for path in tracked():
        if path.suffix in TEXT and (match := LOCAL.search(path.read_text(errors="replace"))):
            found[path.relative_to(ROOT).as_posix()] = match.group()
    assert found == {}
