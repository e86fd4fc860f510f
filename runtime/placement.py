"""Placement: which actor runs on which CPUs and GPUs. One reservation for a run, granted whole or not at all."""

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

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
Claim = tuple[Role, Resources]
ROLES: tuple[Role, ...] = get_args(Role)


class Seat(NamedTuple):
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


class Reservation(NamedTuple):
    """Resources the cluster has set aside for this run."""

    placement_group: PlacementGroup
    seats: dict[Role, list[Seat]]
    """One for each actor of the role; learner ranks follow one another by node."""
    nodes: frozenset[str]
    """Ids of the nodes that the seats are on."""

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
    check_sharing(config)
    check_turns(config)
    asked = _total(_asked(config))
    if placement.device == "cpu" and asked["GPU"]:
        raise UserError("placement.device=cpu asks for GPU shares: set placement.*_gpus=0 or placement.device=cuda")
    if local:
        have = {"CPU": float(cpus()), "GPU": float(local_gpus()) if placement.device == "cuda" else 0.0}
        if any(asked[kind] > have[kind] for kind in asked):
            raise UserError(_shortage(placement, asked, "this machine", have))


def check_sharing(config: Config) -> None:
    """Raises UserError where actors on one GPU could not work there together."""
    placement, engines, ranks = config.placement, config.rollout.engines, config.learner.ranks
    transport, engine, rank = placement.transport, placement.engine_gpus, placement.learner_gpus
    if transport in ("ipc", "nccl") and placement.device == "cpu":
        raise UserError(f"placement.transport={transport} needs placement.device=cuda: set it to store or gloo")
    if transport == "ipc":
        if engines != ranks:
            pairs = f"with placement.transport=ipc learner rank i and engine i share GPU i, but {ranks=} and {engines=}"
            raise UserError(f"{pairs}: make learner.ranks and rollout.engines equal, or set placement.transport=store")
        fullest = max(_bundles(config), key=len)
        if (share_of_gpu := _total([claim for _, claim in fullest])["GPU"]) > 1:
            who = f"an engine, a learner rank and {len(fullest) - 2} reward workers (placement.transport=ipc)"
            raise UserError(f"{who} share a GPU and their shares add up to {share_of_gpu:g}: lower placement.*_gpus")
        return
    meetings = {
        "an engine and learner rank 0": transport == "nccl" and engine + rank <= 1,
        "two engines": transport == "nccl" and engines > 1 and 2 * engine <= 1,
        "two learner ranks": placement.device == "cuda" and ranks > 1 and 2 * rank <= 1,
    }
    for who in (who for who, is_so in meetings.items() if is_so):
        shares = f"placement.engine_gpus={engine:g} and placement.learner_gpus={rank:g} let {who} land on one GPU"
        cure = "give each whole GPUs, or let engine i and learner rank i share one by placement.transport=ipc"
        raise UserError(f"{shares}, where NCCL does not join them: {cure}")


def check_turns(config: Config) -> None:
    """Raises UserError where engine and learner cannot take turns on a GPU (`placement.sleep`)."""
    needed = {
        "placement.device=cuda": config.placement.device == "cuda",
        "placement.transport=ipc": config.placement.transport == "ipc",
        "pipeline.max_staleness=0": config.pipeline.max_staleness == 0,
    }
    if config.placement.sleep and (missing := [what for what, is_so in needed.items() if not is_so]):
        raise UserError(f"placement.sleep=true has engine and learner take turns on a GPU: set {' and '.join(missing)}")


def reserve(config: Config) -> Reservation:
    """One bundle per actor, or with `transport=ipc` per GPU, granted all together or not at all.

    Raises UserError if the cluster has not granted them within `placement.start_timeout_s`.
    """
    placement, asked = config.placement, _asked(config)
    granted = placement_group([{k: v for k, v in one.items() if v} for one in asked], strategy=placement.strategy)
    _await_grant(granted, placement, _total(asked))
    on = placement_group_table(granted)["bundles_to_node_id"]
    nodes, planned = [on[number] for number in range(len(asked))], _bundles(config)
    ranks = [number for number, claims in enumerate(planned) if "learner" in dict(claims)]
    places = gathered(asked, ranks, nodes)
    seated = [(role, claim, place) for claims, place in zip(planned, places, strict=True) for role, claim in claims]
    threads: dict[str, int] = {}
    if placement.device == "cuda" and not placement.threads:
        cores = {node["NodeID"]: node["Resources"].get("CPU", 0.0) for node in ray.nodes()}
        threads = fair_threads([nodes[place] for *_, place in seated], cores)
    seats: dict[Role, list[Seat]] = {role: [] for role in ROLES}
    for role, claim, place in seated:
        seats[role].append(Seat(claim["CPU"], claim["GPU"], granted, place, threads.get(nodes[place], 0)))
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


def fair_threads(nodes: Sequence[str], cores: Mapping[str, float]) -> dict[str, int]:
    """Threads of an actor by its node: the node's cores shared among its actors, at least one. nodes: of each actor."""
    return {node: max(1, int(cores[node]) // actors) for node, actors in Counter(nodes).items()}


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


def counts(config: Config) -> dict[Role, int]:
    """Actors by role."""
    return {"learner": config.learner.ranks, "engine": config.rollout.engines, "reward": config.reward.workers}


def _claims(config: Config, role: Role) -> list[Claim]:
    return [(role, share(config.placement, role, config.rollout.tensor_parallel))] * counts(config)[role]


def _bundles(config: Config) -> list[list[Claim]]:
    """What each bundle seats: one actor; with `transport=ipc` an engine, its learner rank and every Nth reward worker,
    which share a GPU."""
    engines, rewards, ranks = (_claims(config, role) for role in ROLES)
    if config.placement.transport != "ipc":
        return [[claim] for claim in engines + rewards + ranks]
    pairs = enumerate(zip(engines, ranks, strict=True))
    return [[engine, *rewards[gpu :: len(engines)], rank] for gpu, (engine, rank) in pairs]


def _asked(config: Config) -> list[Resources]:
    """By bundle. A GPU that is shared is asked for whole: Ray may put two bundles with parts of one on the same GPU."""
    asked = [_total([claim for _, claim in claims]) for claims in _bundles(config)]
    if config.placement.transport == "ipc":
        return [one | {"GPU": float(math.ceil(one["GPU"]))} for one in asked]
    return asked


def _total(asked: Sequence[Resources]) -> Resources:
    """Rounded to Ray's own resolution, so that 0.1 + 0.2 does not ask for more than 0.3."""
    return {kind: round(sum(one[kind] for one in asked), 4) for kind in ("CPU", "GPU")}


def _shortage(
    placement: PlacementConfig, asked: Resources, where: str, have: Resources, free: Resources | None = None
) -> str:
    def say(r: Resources) -> str:
        return f"{r.get('CPU', 0.0):g} CPUs" + (f" and {r.get('GPU', 0.0):g} GPUs" if asked["GPU"] else "")

    text = f"placement={placement.name} asks for {say(asked)}, {where} has {say(have)}"
    return text + (f" ({say(free)} free)" if free is not None else "") + ": lower placement.* or the number of actors"
