"""From the command line to a typed `Config`; every mistake is one line that names the nearest valid key."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError

from launch.errors import UserError
from perception.config import Config
from perception.errors import DataError

_ADAPTER = TypeAdapter(Config, config=ConfigDict(extra="forbid"))


def validate(tree: DictConfig) -> Config:
    """The typed settings of a composed tree. Raises UserError for the first unknown, missing or ill-typed key."""
    try:
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {_first_line(error)}") from error
    try:
        return _ADAPTER.validate_python(plain)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            raise UserError(_unknown(key, _keys(plain))) from error
        raise UserError(f"config: {key}={first['input']!r}: {first['msg']}") from error


def entry(run: Callable[[Config], None]) -> NoReturn:
    """Compose, validate, run; exit 2 with one line on the user's mistakes, 0 when done. `--multirun` sweeps."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us instead of being printed by Hydra

    @hydra.main(version_base="1.3", config_path="../conf", config_name="config")
    def compose_and_run(tree: DictConfig) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            overrides = HydraConfig.get().job.override_dirname.replace("/", "_")
            tree.run.name = f"{tree.run.name}-{overrides}"
        run(validate(tree))

    try:
        compose_and_run()
    except (UserError, DataError) as error:
        _fail(str(error))
    except HydraException as error:
        _fail(_explain(error))
    sys.exit(0)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _explain(error: HydraException) -> str:
    """Hydra's own words, and for an unknown key the nearest valid one."""
    for override in sys.argv[1:]:
        key = override.split("=", 1)[0].lstrip("+~")
        if f"'{key}'" in str(error):
            with hydra.initialize(version_base="1.3", config_path="../conf"):
                tree = hydra.compose("config", overrides=[], return_hydra_config=False)
            groups = [name for name in os.listdir(os.path.join(os.path.dirname(__file__), "..", "conf"))]
            return _unknown(key, [*_keys(OmegaConf.to_container(tree, resolve=False)), *groups])
    return f"config: {_first_line(error)}"


def _unknown(key: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.0)
    return f"config: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _keys(tree: Any, prefix: str = "") -> list[str]:
    if not isinstance(tree, dict):
        return []
    below = [name for key, value in tree.items() for name in _keys(value, f"{prefix}{key}.")]
    return [*(f"{prefix}{key}" for key in tree), *below]


def _first_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:300]
