"""Placement: which actor runs on which CPUs and GPUs. One reservation for a run, granted whole or not at all."""

import logging
import time
from dataclasses import dataclass
from typing import Any, Literal, get_args

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from perception.config import Config, PlacementConfig
from perception.errors import UserError
from runtime.cluster import cluster_address, cpus, local_gpus

log = logging.getLogger(__name__)

GRANT_POLL_S = 5.0
Resources = dict[str, float]
Role = Literal["engine", "reward", "learner"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Seat:
    """An actor's share of CPUs and GPUs, in a bundle of a placement group or, without one, anywhere."""

    cpus: float
    gpus: float
    placement_group: PlacementGroup | None = None
    bundle: int = -1

    def options(self) -> dict[str, Any]:
        """Options as `ray.remote(...).options` takes them."""
        options: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        if self.placement_group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self.placement_group, self.bundle)
        return options


@dataclass(frozen=True, slots=True)
class Reservation:
    """Resources the cluster has set aside for this run."""

    placement_group: PlacementGroup
    seats: dict[Role, list[Seat]]
    """One for each actor of the role."""

    def free(self) -> None:
        """Give everything back; actors still sitting in the bundles are killed by Ray."""
        remove_placement_group(self.placement_group)


def share(placement: PlacementConfig, role: Role, tensor_parallel: int = 1) -> Resources:
    """CPUs and GPUs that one actor of this role claims: an engine for each of its `rollout.tensor_parallel` workers."""
    workers = tensor_parallel if role == "engine" else 1
    return {"CPU": getattr(placement, f"{role}_cpus") * workers, "GPU": getattr(placement, f"{role}_gpus") * workers}


def anywhere(placement: PlacementConfig, role: Role, count: int, tensor_parallel: int = 1) -> list[Seat]:
    """Seats outside any reservation."""
    own = share(placement, role, tensor_parallel)
    return [Seat(own["CPU"], own["GPU"]) for _ in range(count)]


def check_resources(config: Config) -> None:
    """Fail before anything is started if this machine cannot hold the run.

    A cluster's resources are only known once it is joined, so there `reserve` decides.
    Raises UserError naming what was asked and what there is.
    """
    placement = config.placement
    local = cluster_address() is None
    if local and placement.device == "cuda" and not local_gpus():
        raise UserError(f"placement={placement.name} needs a CUDA GPU and this machine shows none: use placement=cpu")
    for role in ROLES:
        if not any(share(placement, role).values()):
            raise UserError(f"placement.{role}_cpus and placement.{role}_gpus are both 0: give one of them a share")
    workers = config.rollout.tensor_parallel
    whole = placement.device == "cpu" or (placement.engine_gpus == 1 and placement.transport != "ipc")
    if workers > 1 and not whole:
        cure = "set placement.engine_gpus=1 and placement.transport=nccl or store"
        raise UserError(f"rollout.tensor_parallel={workers} needs a whole GPU for each worker and no CUDA IPC: {cure}")
    asked = _asked(config)
    if placement.transport == "ipc" and asked["GPU"] > 1:
        raise UserError(
            f"placement.transport=ipc puts everything on one GPU, but the shares add up to {asked['GPU']:g}: "
            "lower placement.*_gpus or set placement.transport=store"
        )
    if placement.device == "cpu" and asked["GPU"]:
        raise UserError("placement.device=cpu asks for GPU shares: set placement.*_gpus=0 or placement.device=cuda")
    if local:
        have = {"CPU": float(cpus()), "GPU": float(local_gpus()) if placement.device == "cuda" else 0.0}
        if any(asked[kind] > have[kind] for kind in asked):
            raise UserError(_shortage(placement, asked, "this machine", have))


def reserve(config: Config) -> Reservation:
    """One bundle per actor, granted all together or not at all.

    With `transport=ipc` the actors share one bundle instead: CUDA IPC needs them on the same device.
    Raises UserError if the cluster has not granted them within `placement.start_timeout_s`.
    """
    placement, asked = config.placement, _asked(config)
    claims = [(role, claim) for role, claim, count in _claims(config) for _ in range(count)]
    shared = placement.transport == "ipc"
    bundles = [asked] if shared else [claim for _, claim in claims]
    granted = placement_group([{k: v for k, v in b.items() if v} for b in bundles], strategy=placement.strategy)
    _await_grant(granted, placement, asked)
    seats: dict[Role, list[Seat]] = {role: [] for role in ROLES}
    for number, (role, claim) in enumerate(claims):
        seats[role].append(Seat(claim["CPU"], claim["GPU"], granted, 0 if shared else number))
    return Reservation(granted, seats)


def _await_grant(wanted: PlacementGroup, placement: PlacementConfig, asked: Resources) -> None:
    deadline = time.monotonic() + placement.start_timeout_s
    warned = False
    while not wanted.wait(min(GRANT_POLL_S, max(0.0, deadline - time.monotonic()))):
        shortage = _shortage(placement, asked, "the cluster", ray.cluster_resources(), ray.available_resources())
        if time.monotonic() >= deadline:
            remove_placement_group(wanted)
            raise UserError(f"{shortage}; gave up after {placement.start_timeout_s:g} s (placement.start_timeout_s)")
        if not warned:
            log.warning("%s; waiting up to %g s", shortage, placement.start_timeout_s)
            warned = True


def _claims(config: Config) -> list[tuple[Role, Resources, int]]:
    """By role: the share of one actor, and how many there are."""
    counts = {"engine": config.rollout.engines, "reward": config.reward.workers, "learner": config.learner.ranks}
    return [(role, share(config.placement, role, config.rollout.tensor_parallel), counts[role]) for role in ROLES]


def _asked(config: Config) -> Resources:
    """Everything together, rounded to Ray's own resolution, so that 0.1 + 0.2 does not ask for more than 0.3."""
    claims = _claims(config)
    return {kind: round(sum(claim[kind] * count for _, claim, count in claims), 4) for kind in ("CPU", "GPU")}


def _shortage(
    placement: PlacementConfig, asked: Resources, where: str, have: Resources, free: Resources | None = None
) -> str:
    def say(r: Resources) -> str:
        return f"{r.get('CPU', 0.0):g} CPUs" + (f" and {r.get('GPU', 0.0):g} GPUs" if asked["GPU"] else "")

    text = f"placement={placement.name} asks for {say(asked)}, {where} has {say(have)}"
    return text + (f" ({say(free)} free)" if free is not None else "") + ": lower placement.* or the number of actors"
