"""Models by name: a directory, a model's folder in a hub cache, or a hub id."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from launch.run.command_line import one_line
from perception.config import Config
from perception.errors import DataError, UserError

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_READ = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "*.yaml", "*.pt"]


def located(config: Config) -> Config:
    """The settings with directories in place of other names. Raises UserError for a hub id that cannot be had."""
    model = config.model
    path = model.path if model.shape else directory("model.path", model.path)
    return replace(config, model=replace(model, path=path, segmenter=directory("model.segmenter", model.segmenter)))


def directory(key: str, name: str) -> str:
    """Where a model lies: the snapshot that a folder of a hub cache calls `main`, or that of `owner/name` or
    `owner/name@revision`, downloaded unless the cache has its weights. Any other name is returned as it is.

    `key` names the setting in messages. Raises UserError for a hub id that neither cache nor hub has.
    """
    if (main := Path(name, "refs", "main")).is_file():
        return str(Path(name, "snapshots", main.read_text(encoding="utf-8").strip()))
    if Path(name).exists() or not (hub := _HUB_ID.fullmatch(name)):
        return name
    why = "no weights there"
    for cached in (True, False):
        try:
            folder = snapshot_download(hub[1], revision=hub[2], local_files_only=cached, allow_patterns=_READ)
            if any(file.suffix in (".safetensors", ".pt") for file in Path(folder).iterdir()):
                return folder
        except (HfHubHTTPError, OSError, ValueError) as error:
            why = str(error).strip().splitlines()[0]
    cure = f"run `hf download {hub[1]}` where there is a network, or give a directory"
    raise UserError(f"{key}={name}: no such directory, and not to be had from the hub ({why}); {cure}")


@contextmanager
def reading(path: str, failed: str = "its files cannot be used") -> Iterator[None]:
    """Within this a policy's own files are read. Raises UserError, one line, for whatever transformers raises: it
    checks few types, and stumbles over odd files wherever it first uses them."""
    try:
        yield
    except (UserError, DataError):
        raise
    except Exception as error:
        raise UserError(f"model.path={path}: {failed}: {one_line(error)} ({type(error).__name__})") from error
