"""From the command line to a typed `Config`: Hydra composes `conf/` over the typed defaults, pydantic checks them.

The dataclasses of `perception/config/` enter Hydra as plain mappings, "???" where they have no default (its
structured configs refuse `Literal` and frozen classes); a field that is a mapping takes new keys without a `+`.
"""

import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, get_origin, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter

from launch.record import run_directory
from launch.run.command_line import leaves, one_line, told, typed, unknown, valid_keys
from perception.config import Config, RunConfig
from perception.errors import UserError

CONF = Path(__file__).resolve().parents[2] / "conf"
_WHOLE = re.compile(r"(reward\.(?:components|ranked))=\{")


def defaults(kind: Any) -> dict[str, Any]:
    """A dataclass of settings as the mapping that Hydra composes over."""
    hints = get_type_hints(kind)
    return {one.name: _default(one, hints[one.name]) for one in fields(kind)}


@cache
def _typed_defaults() -> DictConfig:
    return OmegaConf.create(defaults(Config))


def _default(one: Field, hint: Any) -> Any:
    if is_dataclass(hint):
        return defaults(hint)
    if get_origin(hint) is dict:
        return OmegaConf.create({}, flags={"struct": False})
    return "???" if one.default is MISSING else one.default


def compose(words: Sequence[str]) -> Config:
    """The settings that these overrides make of `conf/`, as on the command line. Raises UserError."""
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return validate(hydra.compose("config", with_base(words)))
    except HydraException as error:
        raise UserError(_explain(error)) from error


def settings(words: Sequence[str]) -> Config:
    """The settings of a command line. Without a recipe the quickstart's fill in, but not its data beside the user's."""
    if any(word.startswith("recipe=") for word in words):
        return compose(words)
    keys = {word.partition("=")[0] for word in words}
    sets = {"data.train", "data.eval"}
    return compose(["recipe=quickstart", *words, *(f"{key}=" for key in sets - keys if keys & sets)])


def with_base(words: Sequence[str]) -> list[str]:
    """Has Hydra compose over the typed defaults, or over the settings of the run that `run.resume` names among these
    words; returns them, and what else that needs. A `recipe=` composes anew, and so does a group's choice its group."""
    base: Any = _typed_defaults()
    given = OmegaConf.from_dotlist([word for word in words if word.startswith(("run.resume=", "run.output="))])
    chosen = {word.partition("=")[0] for word in words}
    if OmegaConf.select(given, "run.resume") is not None and "recipe" not in chosen:
        run = typed(RunConfig, {key: str(value) for key, value in given.run.items()})
        saved = run_directory.settings(run_directory.find(run))
        base = OmegaConf.merge(base, {key: value for key, value in saved.items() if key not in chosen})
        words = [*words, "~recipe"]
    ConfigStore.instance().store(name="typed_defaults", node=base)
    return [one for word in words for one in _replacing(word)]


def _replacing(word: str) -> list[str]:
    """A reward given as a whole takes the place of the preset's, to which Hydra would add it."""
    return [f"~{whole[1]}", f"+{word}"] if (whole := _WHOLE.match(word)) else [word]


def plain(config: Config) -> dict[str, Any]:
    """The settings as config.yaml keeps them, without what is only for the moment of resuming."""
    lasting = replace(config, run=replace(config.run, resume=None, new_data=False))
    return TypeAdapter(Config).dump_python(lasting, mode="json")


def changes(config: Config) -> list[str]:
    """A line for each setting in which a run that is resumed differs from what it was."""
    if config.run.resume is None:
        return []
    saved = run_directory.settings(run_directory.find(config.run))
    before, now = ({key: value for key, value in leaves(one) if value != {}} for one in (saved, plain(config)))
    keys = [key for key in before | now if before.get(key) != now.get(key)]
    return [f"changed: {key}={now.get(key)}, was {before.get(key)}" for key in keys]


def validate(tree: DictConfig) -> Config:
    """The typed settings of a composed tree. Raises UserError for what is missing, unknown or ill-typed."""
    try:
        if missing := sorted(OmegaConf.missing_keys(tree)):
            raise UserError(f"no value for {', '.join(missing)}: give {missing[0]}=... (command line or recipe)")
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {one_line(error)}") from error
    return typed(Config, plain)


def entry(run: Callable[[Config], None]) -> NoReturn:
    """Compose, validate, run; exit 2 with one line on the user's mistakes, 0 when done.

    `--multirun` does so for each combination of a sweep, in a process of its own (`hydra_plugins.relook_launcher`).
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us instead of being printed by Hydra

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def compose_and_run(tree: DictConfig) -> None:
        with told():
            run(validate(tree))

    with told():
        sys.argv[1:] = with_base([re.sub(r"^--(?=[\w.]+\.\w+=)", "", word) for word in sys.argv[1:]])  # W&B's ${args}
        try:
            compose_and_run()
        except HydraException as error:
            raise UserError(_explain(error)) from error
    sys.exit(0)


def _explain(error: HydraException) -> str:
    """The recipes where none was chosen, an unknown key with its nearest valid one, or Hydra's own words."""
    if str(error).startswith("You must specify 'recipe'"):
        return f"no recipe was chosen; give recipe=NAME, one of{_recipes()}"
    if found := re.match(r"Could not override '([^']+)'", str(error)):
        return unknown(found[1], [*valid_keys(Config), "recipe"])
    if found := re.search(r"Ambiguous value for argument '(.+)'", str(error)):
        return _quoted(found[1])
    if isinstance(error, OverrideParseException):
        return _quoted(error.override)
    if found := re.search(r"Could not find '(.+)/(.+)'\s+Available options in .+:\s([^:]*)\sConfig", str(error)):
        return f"{found[1]}={found[2]}: no such choice; there are {', '.join(found[3].split())}"
    return f"config: {one_line(error)}"


def _quoted(override: str) -> str:
    """How a shell must be given a value that Hydra's grammar cannot read as it stands."""
    key, _, value = override.partition("=")
    escaped = value.replace('"', r"\"")
    word = shlex.quote(f'{key}="{escaped}"')
    return f"{override}: some of its signs mean something to Hydra; quote the value: {word}"


def _recipes() -> str:
    """A line each: name, and the first line of its file's comment."""
    files, comment = sorted((CONF / "recipe").glob("*.yaml")), re.compile(r"^# (?!@)(.*)", re.M)
    return "".join(f"\n  {file.stem:12}  {comment.findall(file.read_text(encoding='utf-8'))[0]}" for file in files)
