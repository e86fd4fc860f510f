"""From the command line to a typed `Config`; every mistake is one line that names the nearest valid key."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from launch.run.command_line import told
from perception.config import Config, TaskConfig
from perception.errors import UserError

CONF = Path(__file__).resolve().parents[2] / "conf"


class _Root(BaseModel):
    """Nested stdlib dataclasses take their model's rules."""

    model_config = ConfigDict(extra="forbid")
    config: Config


def compose(overrides: Sequence[str]) -> Config:
    """The settings that these overrides make of `conf/`, as on the command line. Raises UserError."""
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return validate(hydra.compose("config", list(overrides)))
    except HydraException as error:
        raise UserError(f"config: {_first_line(error)}") from error


def validate(tree: DictConfig) -> Config:
    """The typed settings of a composed tree. Raises UserError for the first unknown, missing or ill-typed key."""
    try:
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {_first_line(error)}") from error
    try:
        return _Root.model_validate({"config": plain}).config
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"][1:]))
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            raise UserError(_unknown(key, valid_keys())) from error
        raise UserError(f"config: {key}={first['input']!r}: {first['msg']}") from error


def read_tasks(name: str) -> dict[str, TaskConfig]:
    """The task templates of `conf/task/<name>.yaml`."""
    tree = OmegaConf.to_container(OmegaConf.load(CONF / "task" / f"{name}.yaml"), resolve=True)
    return TypeAdapter(dict[str, TaskConfig]).validate_python(tree)


def entry(run: Callable[[Config], None]) -> NoReturn:
    """Compose, validate, run; exit 2 with one line on the user's mistakes, 0 when done. `--multirun` sweeps."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us instead of being printed by Hydra

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def compose_and_run(tree: DictConfig) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            overrides = HydraConfig.get().job.override_dirname.replace("/", "_")
            tree.run.name = f"{tree.run.name}-{overrides}"
        with told():
            run(validate(tree))

    with told():
        try:
            compose_and_run()
        except HydraException as error:
            raise UserError(_explain(error)) from error
    sys.exit(0)


def valid_keys(kind: Any = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the settings."""
    if not is_dataclass(kind):
        return []
    hints = get_type_hints(kind)
    below = [valid_keys(_inner(hints[f.name]), f"{prefix}{f.name}.") for f in fields(kind)]
    return [f"{prefix}{f.name}" for f in fields(kind)] + [key for keys in below for key in keys]


def _inner(hint: Any) -> Any:
    """The dataclass behind `X | None`; a dict's keys are the user's own."""
    if get_origin(hint) is dict:
        return None
    return next((part for part in get_args(hint) if is_dataclass(part)), hint)


def _explain(error: HydraException) -> str:
    """An unknown key with its nearest valid one, or Hydra's own words."""
    valid = [*valid_keys(), *(path.name for path in CONF.iterdir() if path.is_dir())]
    for override in sys.argv[1:]:
        key, equals, _ = override.partition("=")
        if equals and not key.startswith(("-", "+", "~", "hydra")) and key not in valid:
            return _unknown(key, valid)
    return f"config: {_first_line(error)}"


def _unknown(key: str, valid: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.0)
    return f"config: unknown key {key!r}; did you mean {near[0]!r}?"


def _first_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:300]
