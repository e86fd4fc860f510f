"""Guards that every command line in the documents works on the machine it is meant for, and is refused where it lacks
something: composed and checked as the program would, with invented cores, GPUs and memory. Nothing is started."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from launch.record import run_directory
from launch.run import checks, memory
from launch.run.command_line import parse
from launch.run.config import compose, plain, settings
from launch.run.memory import Machine
from perception.config import Config
from perception.errors import UserError
from synthetic.sft import WarmStartSettings
from synthetic.world import World

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(path for folder in ("docs", "docker") for path in sorted((ROOT / folder).iterdir())),
    *sorted((ROOT / "conf").rglob("*.yaml")),
]
DOCUMENTS = [path for path in FILES if path.suffix not in (".py", ".svg", ".png")]
BEGINS = r"(?:\.venv/bin/)?python (?:-m|docs/\S+)|ray job submit|docker|make"
LINE = re.compile(rf"^(?:#? {{1,6}}|# |RUN |)((?:{BEGINS}) .+)$")
"""A line that is a command: indented, behind a comment's sign, or an instruction of a Dockerfile."""
QUOTED = re.compile(rf"`((?:{BEGINS}) [^`]+)`")
MACHINES = {
    "cpu": (2, 0, Machine(gpu=None, host=8.0, disk=20.0)),
    "one_gpu": (8, 1, Machine(gpu=79.2, host=96.0, disk=200.0)),
    "cluster": (64, 8, Machine(gpu=79.2, host=400.0, disk=400.0)),
}
"""By placement: cores, GPUs, memory."""
OWN = {"model.path=...": "model.shape=7b", "model.segmenter=...": "model.segmenter=random:large"}
"""What stands for a user's own model, which is not there."""


def commands(path: Path) -> Iterator[str]:
    """The command lines of a document; lines that end in a backslash are one."""
    text = path.read_text(encoding="utf-8")
    if path.name == "sweep.yaml":
        yield shlex.join(agent_command(yaml.safe_load(text)))
    for line in re.sub(r" \\\n#? *", " ", text).splitlines():
        if found := QUOTED.findall(line):
            yield from found
        elif match := LINE.match(line):
            yield match[1]
        elif line.startswith("CMD "):
            yield shlex.join(json.loads(line.removeprefix("CMD ")))


def agent_command(sweep: Mapping[str, Any], macro: str = "args_no_hyphens") -> list[str]:
    """What W&B's agent runs for the smallest or first value of each parameter."""
    chosen = {
        key: {"value": one["values"][0] if "values" in one else one["min"]} for key, one in sweep["parameters"].items()
    }
    given = create_sweep_command_args({"args": chosen})
    words = [
        f"${{{macro}}}" if word == "${args_no_hyphens}" else word for word in create_sweep_command(sweep["command"])
    ]
    macros = {"${env}": [], **{f"${{{key}}}": value for key, value in given.items()}}
    return [one for word in words for one in macros.get(word, [word])]


FOUND = sorted({(path.relative_to(ROOT).as_posix(), command) for path in DOCUMENTS for command in commands(path)})


def test_no_command_is_overlooked() -> None:
    """Every place where a document says `python -m`, or has a line that begins like a command, was found."""
    assert len(FOUND) > 40 and len({document for document, _ in FOUND}) >= 6
    for path in DOCUMENTS:
        said = re.findall(r"python\W+-m\b", path.read_text(encoding="utf-8"))  # also as items of a YAML list
        assert sum(command.count("python -m ") for command in commands(path)) == len(said), path


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin that a document shows is no file; its names are checked where it is run (`benchmarks.extension`)."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(checks, "check_registered", lambda config: None)


@pytest.mark.parametrize(("document", "command"), FOUND)
def test_a_documented_command_works(document: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    classify(shlex.split(command, comments=True), monkeypatch)


def classify(words: Sequence[str], patch: pytest.MonkeyPatch) -> None:
    """Check one command. Fails for one of a kind that nothing here knows."""
    match words:
        case ["make", *targets]:
            rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
            assert [one for one in targets if "=" not in one and one not in rules] == []
        case ["docker", "build", "-f", file, "-t", tag, "."]:
            assert tag == f"relook:{Path(file).suffix[1:]}" and (ROOT / file).is_file()
        case ["docker", "run", *options]:
            at = next(number for number, word in enumerate(options) if word.startswith("relook:"))
            file = ROOT / "docker" / f"Dockerfile.{options[at].removeprefix('relook:')}"
            inside = options[at + 1 :] or shlex.split(next(c for c in commands(file) if "docker" not in c))
            assert ("--gpus" in options) == ("cuda" in file.name)
            classify(inside, patch)
        case ["ray", "job", "submit", *options]:
            classify(options[options.index("--") + 1 :], patch)
        case [".venv/bin/python" | "python", script, *arguments] if script.startswith("docs/"):
            program(script.removesuffix(".py").replace("/", "."), arguments, patch)
        case [".venv/bin/python" | "python", "-m", module, *arguments]:
            program(module, arguments, patch)
        case _:
            pytest.fail(f"a command that this test does not know: {shlex.join(words)}")


def program(module: str, arguments: Sequence[str], patch: pytest.MonkeyPatch) -> None:
    match module, arguments:
        case "launch.train" | "launch.evaluate", []:
            with pytest.raises(UserError, match="no recipe was chosen"):
                compose([])
        case "launch.train" | "launch.evaluate", _:
            run(arguments, patch)
        case "launch.data", ["show" | "check", *words]:
            settings([word for word in words if "=" in word])
        case "launch.world", _:
            parse(World, arguments)
        case "launch.sft", _:
            parse(WarmStartSettings, arguments)
        case "launch.doctor", words:
            assert {word for word in words if "=" not in word} <= {"--deep"}
            _ = words and settings([word for word in words if "=" in word])
        case "launch.report", [*folders]:
            assert folders and not any(word.startswith("-") or "=" in word for word in folders)
        case _ if module.startswith(("benchmarks.", "docs.")):
            options(module, [word.split("|")[0] for word in arguments], patch)
        case _:
            pytest.fail(f"a program that this test does not know: {module}")


def run(arguments: Sequence[str], patch: pytest.MonkeyPatch) -> None:
    """A run that fits its machine; without the GPUs, or on fewer cores, it is refused."""
    given = [OWN.get(word, word) for word in arguments if word != "--multirun" and not word.startswith("hydra")]
    if "--multirun" in arguments:
        given = [re.sub(r"=tag\(log,interval\((.*?),.*", r"=\1", word).split(",")[0] for word in given]
    patch.setenv("WANDB_RUN_ID", "1a2b3c4d")
    if any(word.startswith("run.resume=") for word in given):  # what that run left
        left = plain(compose(["recipe=quickstart"]))
        patch.setattr(run_directory, "find", lambda run: Path(run.resume))
        patch.setattr(run_directory, "settings", lambda run_dir: left)
    config = compose([*given, *(["model.path=absent"] if "model.shape=7b" in given else [])])
    if not Path(config.model.path).exists() and config.model.shape is None:
        config = compose([*given, "model.path=assets/policy"])  # what another run leaves
    cores, gpus, machine = MACHINES[config.placement.name]
    check(config, cores, gpus, machine, patch)
    with pytest.raises(UserError) as refused:
        check(config, 1, max(0, gpus - 1), machine, patch)
    assert "\n" not in str(refused.value)


def check(config: Config, cores: int, gpus: int, machine: Machine, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("runtime.placement.cpus", lambda: cores)
    patch.setattr("runtime.placement.local_gpus", lambda: gpus)
    patch.setattr(memory, "this_machine", lambda config: machine)
    checks.check_settings(config)
    checks.check_resources(config)
    checks.check_memory(config, lambda table: None)


def options(module: str, arguments: Sequence[str], patch: pytest.MonkeyPatch) -> None:
    """The program's own parser takes its arguments; it goes no further."""

    class Parsed(Exception):
        pass

    original = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, *given: object) -> None:
        original(parser, *given)  # type: ignore[call-overload]
        raise Parsed

    patch.setattr(sys, "argv", [module, *arguments])
    patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    with pytest.raises(Parsed):
        import_module(module).main()


@pytest.mark.parametrize(
    "words",
    [
        ["make", "tset"],
        ["docker", "run", "relook:cpu", "make", "tset"],
        ["docker", "build", "-f", "docker/Dockerfile.rocm", "-t", "relook:rocm", "."],
        ["python", "-m", "launch.train", "recipe=quickstart", "learner.lrr=1"],
        ["python", "-m", "launch.train", "recipe=quickstart", "placement=one_gpu", "learner.ranks=2"],
        ["python", "-m", "launch.train", "recipe=dr_seg", "placement=one_gpu", "model.path=...", "data.train=a"],
        ["python", "-m", "launch.world", "trian=4"],
        ["python", "-m", "launch.doctor", "--depe", "model.path=assets/policy"],
        ["python", "-m", "launch.doctor", "modl.path=assets/policy"],
        ["python", "-m", "benchmarks.step", "--stpes", "3"],
        ["python", "-m", "launch.preddict"],
        ["python", "docs/wandb_workspace.py", "ENTITY"],
        ["torchrun", "train.py"],
    ],
)
def test_the_test_above_sees_a_mistake(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, UserError, SystemExit, pytest.fail.Exception)):
        classify(words, monkeypatch)
