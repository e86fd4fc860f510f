"""Ray cluster of a run: the one it was submitted to, or one of its own, and the environment of its workers."""

import json
import logging
import os
import shutil
import socket
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import ray

from perception.config import PlacementConfig
from perception.errors import UserError
from perception.registry import PLUGINS, find_plugins
from runtime.machine import memory

ROOT = Path(__file__).resolve().parents[1]
_SMALLEST_STORE = 1 << 30
CONNECT_TIMEOUT_S = 10.0
LONGEST_TMPDIR = 40

KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
"""glibc gives large blocks back to the kernel at once; on the CPU the page faults of taking them again cost half of a
forward and backward pass (measured: 49 against 90 samples/s)."""

COMPILER_CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "${HOME}/.cache/relook/inductor",
    "TRITON_CACHE_DIR": "${HOME}/.cache/relook/triton",
}
"""Where compiled kernels are kept for the next run, on each node (Ray puts its own HOME in); Inductor's default lies in
/tmp. A variable of the user's own goes first."""


def cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def connect(placement: PlacementConfig, plugins: Sequence[str] = ()) -> None:
    """Join the Ray cluster named by RAY_ADDRESS (`ray job submit` sets it), or start a local one if it is unset.

    Every worker process will load the `plugins`; on a cluster their files are uploaded.
    Raises UserError if the named cluster does not answer.
    """
    address, files = cluster_address(), find_plugins(plugins)
    if len(gettempdir()) > LONGEST_TMPDIR:  # each of the two puts sockets there, whose paths hold 107 bytes
        for name in ("RAY_TMPDIR", "VLLM_RPC_BASE_PATH"):
            os.environ.setdefault(name, "/tmp")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves its workers on a busy machine
    workers: dict[str, Any] = {"env_vars": _worker_env(placement, files)}
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "runtime_env": workers}
    if address is None:
        shared = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
        store = object_store_bytes(memory(), shared)
        options |= {"num_cpus": cpus(), "object_store_memory": store, "include_dashboard": False}
        workers["worker_process_setup_hook"] = f"{__name__}.{leave_terminal.__name__}"
    else:
        _require_listener(address)
        modules = [str(file) for file in files if "site-packages" not in file.parts]
        if modules:  # Ray cannot set up a worker whose list is empty
            workers["py_modules"] = modules
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*override accelerator", category=FutureWarning)
        try:
            ray.init(address or "local", **options)
        except ConnectionError as error:
            raise UserError(f"RAY_ADDRESS={address}: no Ray cluster answers there; unset it to run locally") from error


def object_store_bytes(memory: int, shared: int) -> int:
    """Size of Ray's object store: 30 % of the memory, as Ray's own default, but no more than half of what is free in
    /dev/shm, where weights on their way to an engine stand too.

    1 GiB at least, four weight buckets; where /dev/shm is smaller, Ray takes a folder on disk.
    """
    return max(_SMALLEST_STORE, min(memory * 3 // 10, shared // 2))


def leave_terminal() -> None:
    """Run in every local worker: Ctrl-C is for the controller, which ends the run after its step."""
    os.setpgrp()


def cluster_address() -> str | None:
    """Address of the cluster to join; None: the run starts a Ray of its own."""
    address = os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


def submitted() -> dict[str, Any]:
    """The runtime environment with which this program was submitted as a job; empty where it was not."""
    return json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}


def _require_listener(address: str) -> None:
    """Ray itself tries a dead address for minutes."""
    if address == "auto":
        return
    if address.startswith(("http://", "https://")):
        cure = "take auto or host:6379, or unset it to run locally"
        raise UserError(f"RAY_ADDRESS={address}: that is a dashboard, where `ray job submit` sends jobs; {cure}")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"RAY_ADDRESS={address}: expected host:port, or unset it to run locally")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(f"RAY_ADDRESS={address}: nothing listens there ({error}); unset it to run locally") from error


def local_gpus() -> int:
    """CUDA devices of this machine."""
    import torch  # seconds to import, and needed here only if a GPU is asked for

    return torch.cuda.device_count()


def _worker_env(placement: PlacementConfig, plugins: Sequence[Path]) -> dict[str, str]:
    """Environment of every worker process. What the job was submitted with stays: Ray refuses to merge a clash."""
    env = {PLUGINS: os.environ[PLUGINS], "TOKENIZERS_PARALLELISM": "false"}
    env["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "1")
    if placement.threads:
        env["OMP_NUM_THREADS"] = str(placement.threads)
    if placement.device == "cpu":
        env |= KEEP_FREED_MEMORY
    else:
        env |= {name: os.environ.get(name, folder) for name, folder in COMPILER_CACHES.items()}
    if "working_dir" not in submitted():
        folders = (ROOT, *(plugin.parent for plugin in plugins), os.environ.get("PYTHONPATH"))
        env["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in folders if folder)
    return {name: value for name, value in env.items() if name not in submitted().get("env_vars", {})}
