"""Placement: which actor runs on which CPUs and GPUs. One reservation for a run, granted whole or not at all."""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
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
    threads: int = 0
    """Intra-op threads of its process; 0: as the cluster is set up."""

    def options(self) -> dict[str, Any]:
        """Options as `ray.remote(...).options` takes them."""
        options: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        if self.placement_group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self.placement_group, self.bundle)
        if self.threads:  # else Ray sets it to the actor's CPUs
            options["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(self.threads)}}
        return options


@dataclass(frozen=True, slots=True)
class Reservation:
    """Resources the cluster has set aside for this run."""

    placement_group: PlacementGroup
    seats: dict[Role, list[Seat]]
    """One for each actor of the role; learner ranks follow one another by node."""
    nodes: frozenset[str]
    """Ids of the nodes that the seats are on."""

    def free(self) -> None:
        """Give everything back; actors still sitting in the bundles are killed by Ray."""
        remove_placement_group(self.placement_group)


def share(placement: PlacementConfig, role: Role) -> Resources:
    """CPUs and GPUs that one actor of this role claims."""
    return {"CPU": getattr(placement, f"{role}_cpus"), "GPU": getattr(placement, f"{role}_gpus")}


def anywhere(placement: PlacementConfig, role: Role, count: int) -> list[Seat]:
    """Seats outside any reservation."""
    own = share(placement, role)
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
    claims = [(role, share(placement, role)) for role, count in _counts(config).items() for _ in range(count)]
    shared = placement.transport == "ipc"
    bundles = [asked] if shared else [claim for _, claim in claims]
    granted = placement_group([{k: v for k, v in b.items() if v} for b in bundles], strategy=placement.strategy)
    _await_grant(granted, placement, asked)
    on = placement_group_table(granted)["bundles_to_node_id"]
    nodes = [on[number] for number in range(len(bundles))]
    ranks = [number for number, (role, _) in enumerate(claims) if role == "learner"]
    place = [0] * len(claims) if shared else gathered(bundles, ranks, nodes)
    threads = [0] * len(claims)
    if placement.device == "cuda" and not placement.threads:
        cores = {node["NodeID"]: node["Resources"].get("CPU", 0.0) for node in ray.nodes()}
        threads = fair_threads([nodes[bundle] for bundle in place], cores)
    seats: dict[Role, list[Seat]] = {role: [] for role in ROLES}
    for (role, claim), bundle, own in zip(claims, place, threads, strict=True):
        seats[role].append(Seat(claim["CPU"], claim["GPU"], granted, bundle, own))
    return Reservation(granted, seats, frozenset(nodes))


def gathered(planned: Sequence[Resources], ranks: Sequence[int], nodes: Sequence[str]) -> list[int]:
    """The granted bundle for each planned one: learner ranks sit on as few nodes as can be, in order of node.

    Ray says only which bundle it put on which of the `nodes`; bundles that hold as much may change places.
    ranks: which of the planned bundles hold a learner rank, ascending.
    """
    place = list(range(len(planned)))
    for size in (one for number, one in enumerate(planned) if one not in planned[:number]):
        alike = [number for number, one in enumerate(planned) if one == size]
        there = Counter(nodes[bundle] for bundle in alike)
        fullest_first = sorted(alike, key=lambda bundle: (-there[nodes[bundle]], nodes.index(nodes[bundle])))
        ranks_first = sorted(alike, key=lambda number: number not in ranks)
        for number, bundle in zip(ranks_first, fullest_first, strict=True):
            place[number] = bundle
    return place


def fair_threads(nodes: Sequence[str], cores: Mapping[str, float]) -> list[int]:
    """Threads for each actor, by the node it is on: the node's cores shared among its actors, at least one."""
    actors = Counter(nodes)
    return [max(1, int(cores[node]) // actors[node]) for node in nodes]


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


def _counts(config: Config) -> dict[Role, int]:
    return {"engine": config.rollout.engines, "reward": config.reward.workers, "learner": config.learner.ranks}


def _asked(config: Config) -> Resources:
    """Everything together, rounded to Ray's own resolution, so that 0.1 + 0.2 does not ask for more than 0.3."""
    return {
        kind: round(sum(share(config.placement, role)[kind] * count for role, count in _counts(config).items()), 4)
        for kind in ("CPU", "GPU")
    }


def _shortage(
    placement: PlacementConfig, asked: Resources, where: str, have: Resources, free: Resources | None = None
) -> str:
    def say(r: Resources) -> str:
        return f"{r.get('CPU', 0.0):g} CPUs" + (f" and {r.get('GPU', 0.0):g} GPUs" if asked["GPU"] else "")

    text = f"placement={placement.name} asks for {say(asked)}, {where} has {say(have)}"
    return text + (f" ({say(free)} free)" if free is not None else "") + ": lower placement.* or the number of actors"
