"""Where a run executes: the Ray cluster it was submitted to, or one of its own, and who sits where on it."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from perception.config import Config, PlacementConfig
from perception.errors import UserError

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
LOCAL_OBJECT_STORE_BYTES = 1 << 30
GRANT_POLL_S = 5.0
CONNECT_TIMEOUT_S = 10.0

KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
"""glibc gives large blocks back to the kernel at once; on the CPU the page faults of taking them again cost half of a
forward and backward pass (measured: 49 against 90 samples/s)."""

Resources = dict[str, float]


@dataclass(frozen=True, slots=True)
class Reservation:
    """Resources the cluster has set aside for this run, as indices of the placement group's bundles."""

    group: PlacementGroup
    engines: tuple[int, ...]
    reward_workers: tuple[int, ...]
    learners: tuple[int, ...]

    def free(self) -> None:
        """Give everything back; actors still sitting in the bundles are killed by Ray."""
        remove_placement_group(self.group)


def cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_resources(config: Config) -> None:
    """Fail before anything is started if this machine cannot hold the run.

    A cluster's resources are only known once it is joined, so there `reserve` decides.
    Raises UserError naming what was asked and what there is.
    """
    placement = config.placement
    local = _cluster_address() is None
    if local and placement.device == "cuda" and not _local_gpus():
        raise UserError(f"placement={placement.name} needs a CUDA GPU and this machine shows none: use placement=cpu")
    for role in ("engine", "reward", "learner"):
        if not getattr(placement, f"{role}_cpus") and not getattr(placement, f"{role}_gpus"):
            raise UserError(f"placement.{role}_cpus and placement.{role}_gpus are both 0: give one of them a share")
    asked = _total(_bundles(config))
    if placement.transport == "ipc" and asked["GPU"] > 1:
        raise UserError(
            f"placement.transport=ipc puts everything on one GPU, but the shares add up to {asked['GPU']:g}: "
            "lower placement.*_gpus or set placement.transport=store"
        )
    if placement.device == "cpu" and asked["GPU"]:
        raise UserError("placement.device=cpu asks for GPU shares: set placement.*_gpus=0 or placement.device=cuda")
    if local:
        have = {"CPU": float(cpus()), "GPU": float(_local_gpus()) if placement.device == "cuda" else 0.0}
        if _short(asked, have):
            raise UserError(_shortage(placement, asked, "this machine", have))


def connect(placement: PlacementConfig) -> None:
    """Join the Ray cluster named by RAY_ADDRESS (`ray job submit` sets it), or start a local one if it is unset.

    Raises UserError if the named cluster does not answer.
    """
    address = _cluster_address()
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves its workers on a busy machine
    options: dict[str, Any] = {
        "address": address or "local",
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": _worker_env(placement)},
    }
    if address is None:
        options |= {
            "num_cpus": cpus(),
            "object_store_memory": LOCAL_OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
        options["runtime_env"]["worker_process_setup_hook"] = f"{__name__}.{leave_terminal.__name__}"
    else:
        _require_listener(address)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*override accelerator", category=FutureWarning)
        try:
            ray.init(**options)
        except ConnectionError as error:
            raise UserError(f"RAY_ADDRESS={address}: no Ray cluster answers there; unset it to run locally") from error


def leave_terminal() -> None:
    """Run in every local worker: Ctrl-C is for the controller, which ends the run after its step."""
    os.setpgrp()


def reserve(config: Config) -> Reservation:
    """One bundle per actor, granted all together or not at all.

    With `transport=ipc` the actors share one bundle instead: CUDA IPC needs them on the same device.
    Raises UserError if the cluster has not granted them within `placement.start_timeout_s`.
    """
    placement = config.placement
    bundles = _bundles(config)
    asked = _total(bundles)
    seats = iter(range(len(bundles)))
    if placement.transport == "ipc":
        bundles, seats = [asked], iter([0] * len(bundles))
    group = placement_group([{k: v for k, v in b.items() if v} for b in bundles], strategy=placement.strategy)
    deadline = time.monotonic() + placement.start_timeout_s
    warned = False
    while not group.wait(min(GRANT_POLL_S, max(0.0, deadline - time.monotonic()))):
        shortage = _shortage(placement, asked, "the cluster", ray.cluster_resources(), ray.available_resources())
        if time.monotonic() >= deadline:
            remove_placement_group(group)
            raise UserError(f"{shortage}; gave up after {placement.start_timeout_s:g} s (placement.start_timeout_s)")
        if not warned:
            log.warning("%s; waiting up to %g s", shortage, placement.start_timeout_s)
            warned = True
    engines, workers, ranks = (tuple(next(seats) for _ in range(n)) for n in _actors(config))
    return Reservation(group, engines, workers, ranks)


def _actors(config: Config) -> tuple[int, int, int]:
    return config.rollout.engines, config.reward.workers, config.learner.ranks


def _bundles(config: Config) -> list[Resources]:
    """One per actor: engines, then reward workers, then learner ranks."""
    p = config.placement
    shares = ((p.engine_cpus, p.engine_gpus), (p.reward_cpus, p.reward_gpus), (p.learner_cpus, p.learner_gpus))
    return [
        {"CPU": cpus, "GPU": gpus}
        for count, (cpus, gpus) in zip(_actors(config), shares, strict=True)
        for _ in range(count)
    ]


def _total(bundles: Sequence[Resources]) -> Resources:
    """Rounded to Ray's own resolution, so that 0.1 + 0.2 does not ask for more than 0.3."""
    return {kind: round(sum(b[kind] for b in bundles), 4) for kind in ("CPU", "GPU")}


def _short(asked: Resources, have: Resources) -> bool:
    return any(asked[kind] > have.get(kind, 0.0) for kind in asked)


def _shortage(
    placement: PlacementConfig, asked: Resources, where: str, have: Resources, free: Resources | None = None
) -> str:
    def say(r: Resources) -> str:
        return f"{r.get('CPU', 0.0):g} CPUs" + (f" and {r.get('GPU', 0.0):g} GPUs" if asked["GPU"] else "")

    text = f"placement={placement.name} asks for {say(asked)}, {where} has {say(have)}"
    return text + (f" ({say(free)} free)" if free is not None else "") + ": lower placement.* or the number of actors"


def _cluster_address() -> str | None:
    return os.environ.get("RAY_ADDRESS") or None


def _require_listener(address: str) -> None:
    """Ray itself tries a dead address for minutes."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"RAY_ADDRESS={address}: expected host:port, or unset it to run locally")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(f"RAY_ADDRESS={address}: nothing listens there ({error}); unset it to run locally") from error


def _local_gpus() -> int:
    import torch  # seconds to import, and needed here only if a GPU is asked for

    return torch.cuda.device_count()


def _worker_env(placement: PlacementConfig) -> dict[str, str]:
    """Environment of every worker process. What the job was submitted with stays: Ray refuses to merge a clash."""
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    env = {"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"), "TOKENIZERS_PARALLELISM": "false"}
    if placement.threads:
        env["OMP_NUM_THREADS"] = str(placement.threads)
    if placement.device == "cpu":
        env |= KEEP_FREED_MEMORY
    if "working_dir" not in submitted:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {name: value for name, value in env.items() if name not in submitted.get("env_vars", {})}
