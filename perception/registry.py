"""Registries: tasks, components, readers, surrogates and model families by name, and the plugins that add a user's own.

    TASKS: Registry[Task] = Registry("task")
    TASKS.register("segment")(Segment())

Plugins are Python modules. Their names stand in the environment variable RELOOK_PLUGINS, which every worker process
inherits; each process imports them when it first looks something up.
"""

import difflib
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from perception.errors import UserError

T = TypeVar("T")
PLUGINS = "RELOOK_PLUGINS"


class Registry(Generic[T]):
    """Things of one kind by name, in the order of their registration."""

    def __init__(self, kind: str) -> None:
        """`kind` names them in messages: task, reward component, ..."""
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator. Raises ValueError where the name is taken."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"two {self.kind}s are called '{name}'; choose another name for one of them")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        """Raises UserError with the nearest name."""
        if name in self:
            return self._entries[name]
        raise UserError(f"no {self.kind} '{name}'; {nearest(name, self._entries)}")

    def __contains__(self, name: str) -> bool:
        load_plugins()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        return iter(self._entries)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, and all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f"did you mean '{close[0]}'? (known: {', '.join(names)})" if close else "there are none"


def import_all(package: str) -> None:
    """Import every module of a package, so that what they hold is registered."""
    for module in pkgutil.iter_modules(sys.modules[package].__path__):
        importlib.import_module(f"{package}.{module.name}")


def find_plugins(plugins: Sequence[str]) -> list[Path]:
    """Import modules, or packages and files by path, and name them in RELOOK_PLUGINS for this process and its children.

    Returns the package folder or file that holds each. Raises UserError for what cannot be imported.
    """
    names, files = [], []
    for plugin in plugins:
        path = Path(plugin).resolve()
        name = path.stem if path.exists() else plugin
        if path.exists() and str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        _imported(name, f"plugins={plugin}")
        module = sys.modules[name.partition(".")[0]]
        found = Path(next(iter(module.__path__)) if hasattr(module, "__path__") else inspect.getfile(module)).resolve()
        if path.exists() and found != path:
            raise UserError(f"plugins={plugin}: another module is called '{name}' ({found}); rename yours")
        names.append(name)
        files.append(found)
    os.environ[PLUGINS] = ",".join(names)
    return files


def load_plugins() -> None:
    """Import what RELOOK_PLUGINS names. Raises UserError."""
    for name in filter(None, os.environ.get(PLUGINS, "").split(",")):
        if name not in sys.modules:
            _imported(name, f"plugin {name}")


def _imported(name: str, where: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise UserError(f"{where}: cannot be imported ({type(error).__name__}: {error})") from error


def keyword_only(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Its keyword-only parameters by name: what a user may set."""
    every = inspect.signature(function).parameters
    return {name: one for name, one in every.items() if one.kind is one.KEYWORD_ONLY}


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The given keyword arguments, converted to the annotated types of the function's keyword-only parameters.

    Raises UserError, beginning with `where`, for an unknown, missing or ill-typed one.
    """
    wanted, hints = keyword_only(function), get_type_hints(function)
    arguments: dict[str, Any] = {}
    for name, value in given.items():
        if name not in wanted:
            raise UserError(f"{where}: unknown key '{name}'; {nearest(name, wanted)}")
        try:
            arguments[name] = TypeAdapter(hints[name]).validate_python(value)
        except ValidationError as error:
            raise UserError(f"{where}.{name}={value!r}: {error.errors()[0]['msg']}") from error
    missing = [name for name, parameter in wanted.items() if parameter.default is parameter.empty and name not in given]
    if missing:
        raise UserError(f"{where}: '{missing[0]}' is missing; it has no default")
    return arguments
