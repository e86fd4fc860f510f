"""Weights & Biases in a thread of its own: neither its start nor its network or failures hold up a step; no prompts."""

import logging
import netrc
import os
import queue
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from perception.config import WandbConfig

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 60.0
_SERVICE_WAIT_S = 120.0  # for W&B's own process to start; nobody waits for it but the thread


def logged_in() -> bool:
    """An API key is at hand, in the environment or in the user's netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host is not None and netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def resolved_mode(config: WandbConfig) -> str:
    """auto -> $WANDB_MODE if it is set, else online when logged in, else offline."""
    if config.mode != "auto":
        return config.mode
    return os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")


class WandbSink:
    """Logs from a thread of its own. A failure is one warning; the run goes on without W&B."""

    def __init__(self, config: WandbConfig, run_dir: Path, run_config: Mapping[str, Any]) -> None:
        self._records: queue.SimpleQueue[tuple[int, Mapping[str, float]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        mode = resolved_mode(config)
        if mode != "disabled":
            arguments = (config.project, mode, run_dir, dict(run_config))
            self._thread = threading.Thread(target=self._work, args=arguments, name="wandb", daemon=True)
            self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._thread is not None:
            self._records.put((step, metrics))

    def close(self) -> None:
        """Flush what was logged; gives up after CLOSE_TIMEOUT_S with a warning."""
        if self._thread is None:
            return
        self._records.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            log.warning("W&B did not finish within %.0f s; its last records may be missing", CLOSE_TIMEOUT_S)

    def _work(self, project: str, mode: str, run_dir: Path, run_config: dict[str, Any]) -> None:
        os.environ["WANDB_SILENT"] = "true"
        try:
            import wandb

            run = wandb.init(
                project=project,
                name=run_dir.name,
                id=_run_id(run_dir),
                resume="allow" if mode == "online" else None,
                dir=run_dir,
                mode=mode,  # type: ignore[arg-type]
                config=run_config,
                settings=wandb.Settings(silent=True, console="off", init_timeout=60, x_service_wait=_SERVICE_WAIT_S),
            )
            while (record := self._records.get()) is not None:
                step, metrics = record
                run.log(dict(metrics), step=step)
            run.finish()
        except Exception as error:  # noqa: BLE001 - whatever W&B raises is no reason to end a training run
            log.warning("W&B stopped, the run goes on without it: %s", error)


def _run_id(run_dir: Path) -> str:
    """The same W&B run when a run is resumed."""
    path = run_dir / "wandb_id"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text().strip()
