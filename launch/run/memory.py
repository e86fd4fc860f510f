"""Memory model: what every actor needs on its GPU and its host, from parameter counts and settings, before any starts.

Weights, gradients and optimizer states are exact (ZeRO, arXiv 1910.02054, section 5, with float32 gradients). What
passes is estimated, towards too much: activations, the engine's work space, CUDA contexts. All figures are GiB.
"""

import math
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.modeling_layers import GradientCheckpointingLayer

from learner import families, gated_delta_net
from learner.head import CHUNK_LOGITS
from learner.policy import choose_trained
from learner.weights import weights
from perception.config import Config, LearnerConfig, ModelConfig
from rollout.defaults import by_placement
from runtime.cluster import cluster_address, local_gpus
from runtime.machine import memory as usable_memory
from runtime.placement import Role, counts, share
from synthetic import policies

GIB = 1 << 30
REDUCE_BUCKET, LIVE_PARAMETERS = 500_000_000, 1_000_000_000
"""Numbers in DeepSpeed's reduce buckets together (`learner.zero`), and weights that its ZeRO-3 keeps gathered."""
KEPT = 1.5
"""Numbers that a layer keeps for its backward pass, over the inputs and outputs of its linear maps: 1.25 is measured
for Qwen2.5-VL's text layers, 1.5 for its vision blocks."""
CHUNK_COPIES = 6
"""float32 tensors of a chunk of logits that its forward and backward pass hold at once."""
FRAGMENTS = 0.05
"""Share of a learner's memory that lies idle between its tensors."""
CONTEXT, PROCESS, CONTROLLER = 0.5, 0.6, 1.6
"""A process's CUDA context, its libraries on the host; the controller and Ray's own processes."""
ENGINE_WORK, GRAPHS = 2.0, 1.0
"""What vLLM computes in, and its CUDA graphs."""
SEGMENTER, EMBEDDING, SEGMENTER_WORK = 224_000_000, 4_200_000, 1.0
"""SAM2 of the largest size: parameters, numbers of an image's embedding, and what it computes in."""
CHECKPOINTS = 3
"""Two are kept while another is written."""

Terms = dict[str, float]
"""GiB by what they are for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """The layers of a text model or vision tower."""

    count: int
    hidden: int
    """Numbers of a token between two layers."""
    width: int
    """Inputs and outputs of a layer's linear maps, all together, and what a gated delta net keeps beside them."""
    weights: int
    """Parameters of a layer's linear maps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A policy in numbers, not bytes, under the learner's settings."""

    parameters: int
    trained: int
    sent: int
    """Weights that a sync carries: those that training changes."""
    vocabulary: int
    key_value: int
    """What a token leaves in the KV cache."""
    text: Layers
    vision: Layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is; None: not known from here, as on the nodes of a cluster."""

    gpu: float | None
    """Memory of the smallest GPU."""
    host: float | None
    disk: float
    """Free where `run.output` lies."""


@dataclass(frozen=True, slots=True)
class Room:
    """A place, what each actor puts there, and how much it holds."""

    name: str
    needs: dict[str, Terms]
    has: float | None

    @property
    def parts(self) -> list[tuple[float, str]]:
        return [(value, f"{actor} {term}") for actor, terms in self.needs.items() for term, value in terms.items()]

    @property
    def total(self) -> float:
        return sum(value for value, _ in self.parts)

    @property
    def short(self) -> bool:
        return self.has is not None and self.total > self.has

    def __str__(self) -> str:
        largest = ", ".join(f"{part} {value:.1f}" for value, part in sorted(self.parts, reverse=True)[:3])
        return f"{self.name} needs {self.total:.1f} of {self.has:.1f} GiB ({largest})"


def table(places: Sequence[Room]) -> str:
    """A line for each place, and one or two for each actor there."""
    lines = ["memory, GiB, estimated:"]
    for room in places:
        has = "?" if room.has is None else f"{room.has:.1f}"
        lines.append(f"{room.total:7.1f} of {has:>6}  {room.name}")
        for actor, terms in room.needs.items() if room.name.startswith(("GPU", "host")) else ():
            said = [f"{name} {value:.1f}".replace(" ", "\xa0") for name, value in terms.items() if value >= 0.05]
            start = f"{sum(terms.values()):11.1f}  {actor}: "
            lines += textwrap.wrap(", ".join(said), 98, initial_indent=start, subsequent_indent=" " * 15)
    return "\n".join(lines).replace("\xa0", " ")


def this_machine(config: Config) -> Machine:
    """The GPUs and the disk that this process sees; the host only where the whole run is on it."""
    gpus = [torch.cuda.get_device_properties(index).total_memory for index in range(local_gpus())]
    output = Path(config.run.output).absolute()
    return Machine(
        gpu=min(gpus) / GIB if gpus else None,
        host=usable_memory() / GIB if cluster_address() is None else None,
        disk=shutil.disk_usage(next(path for path in (output, *output.parents) if path.exists())).free / GIB,
    )


def measure(model: ModelConfig, learner: LearnerConfig) -> Size:
    """Count the policy, built without memory on torch's meta device, also where it is yet to be written."""
    if model.shape is not None and not Path(model.path).exists():
        settings: Any = policies.configuration(policies.SHAPES[model.shape], dict.fromkeys(policies.SPECIAL, 0))
    else:
        settings = AutoConfig.from_pretrained(model.path, local_files_only=True)
    family, text = families.family_of(settings.model_type), settings.get_text_config()
    with torch.device("meta"):
        policy: Any = AutoModelForImageTextToText.from_config(settings)
        choose_trained(policy, family, learner)
    named = [(name, one) for name, one in policy.named_modules() if isinstance(one, GradientCheckpointingLayer)]
    texts = [one for name, one in named if re.search(family.adapted, name)]
    towers = [one for name, one in named if not re.search(family.adapted, name)]
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Size(
        parameters=sum(weight.base.numel() for weight in weights(policy).values()),
        trained=sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad),
        sent=sum(weight.base.numel() for weight in weights(policy).values() if weight.trained),
        vocabulary=text.vocab_size,
        key_value=2 * (text.num_hidden_layers - gated_delta_net.layers(text)) * heads * dim,
        text=_layers(texts),
        vision=_layers(towers),
    )


def _layers(modules: list[nn.Module]) -> Layers:
    linears = [[one for one in module.modules() if isinstance(one, nn.Linear)] for module in modules]
    widths = [
        sum(one.in_features + one.out_features for one in layer) + gated_delta_net.kept(module)
        for module, layer in zip(modules, linears, strict=True)
    ]
    products = [sum(one.in_features * one.out_features for one in layer) for layer in linears]
    hidden = max((layer[0].in_features for layer in linears if layer), default=0)
    return Layers(count=len(modules), hidden=hidden, width=max(widths, default=0), weights=max(products, default=0))


def learner(size: Size, config: Config) -> Terms:
    """On the GPU of a rank, or in its process on the CPU."""
    settings, placement, number = config.learner, config.placement, _bytes(config)
    stage, states = settings.zero_stage, size.trained / settings.ranks
    activations, on_gpu = _activations(size, config), 0 if settings.offload_optimizer else 1
    in_place, bucket = stage < 3 and not settings.lora.rank, settings.bucket_mb << 20
    logits = 4 * CHUNK_COPIES * min(CHUNK_LOGITS, settings.micro_tokens * size.vocabulary)
    held = size.parameters * number / (settings.ranks if stage == 3 else 1)
    terms = {
        "weights": held,
        "gradients": 4 * (size.trained if stage == 1 and on_gpu else states),  # offloaded, stage 1 runs as 2
        "optimizer": 12 * states * on_gpu,
        "reduce bucket": number * (REDUCE_BUCKET if placement.device == "cuda" else min(REDUCE_BUCKET, size.trained)),
        "gathered": number * min(LIVE_PARAMETERS, size.parameters) if stage == 3 else 0,
        "reference": held if config.algorithm.kl_coef > 0 and not settings.lora.rank else 0,
        "activations": activations,
        # When they are gone, the optimizer's step copies its gradients into one piece.
        "logits, step": max(logits, 4 * states * on_gpu - activations),
        # By CUDA IPC the parameters themselves are handed out, where the engine takes them as they are.
        "weight sync": (0 if in_place else size.sent * number) if placement.transport == "ipc" else 2 * bucket,
    }
    return _gib(**terms, fragments=FRAGMENTS * sum(terms.values()), context=_context(config))


def _activations(size: Size, config: Config) -> float:
    """Bytes kept for the backward pass of a micro-batch, at most; answers are taken for half of `max_new_tokens`."""
    settings, rollout = config.learner, config.rollout
    tokens = max(settings.micro_tokens, rollout.max_model_len)  # no trajectory is cut
    answers = config.algorithm.group_size if settings.rows == "packed" else 1
    prompt = rollout.max_model_len - rollout.max_new_tokens
    patches = 4 * tokens * prompt / (prompt + answers * rollout.max_new_tokens / 2)
    whole = {"off": 1.0, "selective": 0.5, "on": 0.0}[settings.checkpointing]

    def kept(layers: Layers, count: int) -> float:
        """Every layer's input, all of some of them, and of the one at work."""
        return layers.hidden * count + KEPT * layers.width * (whole * count + 1)

    tower = 0 if settings.freeze_vision or settings.lora.rank else size.vision.count
    numbers = tokens * kept(size.text, size.text.count) + patches * kept(size.vision, tower)
    return numbers * _bytes(config)


def engine(size: Size, config: Config, memory: float | None) -> Terms:
    """On the GPU of each of its workers, or in its process on the CPU.

    `gpu_memory` is a share of all the `memory` of its device; `kv_cache_mb` comes on top of the rest.
    """
    rollout, number, cuda = by_placement(config.rollout, config.placement), _bytes(config), _context(config) > 0
    text = size.text.count * size.text.weights
    linear = text * (1 if rollout.quantization else number) / rollout.tensor_parallel
    weights = (size.parameters - text) * number + linear
    work = (ENGINE_WORK + (0 if rollout.enforce_eager else GRAPHS)) * GIB * cuda
    fixed = _gib(weights=weights, work=work, context=_context(config))
    left = rollout.gpu_memory * (memory or 0.0) - sum(fixed.values())
    return fixed | {"KV cache": rollout.kv_cache_mb / 1024 or max(0.0, left)}


def segmenter(config: Config) -> Terms:
    """SAM2 and the image embeddings that a reward worker keeps."""
    folder, number = Path(config.model.segmenter), 2 if config.placement.device == "cuda" else 4
    files = [*folder.glob("*.pt"), *folder.glob("*.safetensors")]
    parameters = files[0].stat().st_size / 4 if files else SEGMENTER
    scale = min(1.0, parameters / SEGMENTER)
    embeddings = config.reward.image_cache * EMBEDDING * number * scale
    work = SEGMENTER_WORK * GIB * scale
    return _gib(weights=parameters * number, embeddings=embeddings, work=work, context=_context(config))


def host(size: Size, config: Config) -> Terms:
    """On one machine that holds the whole run, beside what stands on its GPUs."""
    settings, number = config.learner, _bytes(config)
    frozen, offloaded = settings.freeze_vision or settings.lora.rank > 0, settings.offload_optimizer
    asleep = number * size.parameters * config.rollout.engines + 12 * size.trained * (not offloaded)
    terms = {
        "optimizer": 18 * size.trained * offloaded,  # master 4, moments 8, gradients 4, result 2
        "loading": number * size.parameters * (settings.ranks if settings.zero_stage < 3 else 1),
        "asleep": asleep * config.placement.sleep,
        "image features": (settings.feature_cache_mb << 20) * settings.ranks * frozen,
        "processes": (CONTROLLER + PROCESS * sum(counts(config).values())) * GIB,
    }
    return _gib(**terms)


def rooms(size: Size, config: Config, machine: Machine) -> list[Room]:
    """Every kind of GPU and the shares of it, an engine's KV cache, the host and the disk, with what they must hold."""
    cuda, actors_of, number = config.placement.device == "cuda", counts(config), _bytes(config)
    memory = machine.gpu if cuda else machine.host
    actors: dict[Role, Terms] = {"learner": learner(size, config), "engine": engine(size, config, memory)}
    actors["reward"] = segmenter(config)
    turns = _turns(actors) if config.placement.sleep else {"": actors}
    needs: list[tuple[str, dict[str, Terms]]] = [
        (turn, {role: {term: n * value for term, value in there[role].items()} for role, n in held.items()})
        for held in (_gpus(config) if cuda else [actors_of])
        for turn, there in turns.items()
    ]
    gpus = [Room(f"GPU of {' + '.join(own)}{turn}", own, memory) for turn, own in needs if cuda]
    limited: tuple[Role, ...] = ("reward",) if config.placement.sleep else ("learner", "reward")
    for role in limited:  # the engine's limit is `rollout.gpu_memory`
        if 0 < (part := share(config.placement, role)["GPU"]) < 1:
            name = f"share of the {role}, placement.{role}_gpus={part:g}"
            gpus.append(Room(name, {role: actors[role]}, memory and part * memory))
    one = _gib(trajectory=config.rollout.max_model_len * size.key_value * number)
    policies = (3 if config.run.eval_every else 1) * size.parameters * number  # policy/, best/ and the one to come
    files = _gib(checkpoints=CHECKPOINTS * 12 * size.trained, policies=policies)
    return [
        *gpus,
        Room("KV cache for one trajectory", {"of": one}, memory and actors["engine"]["KV cache"]),
        Room("host", {"run": host(size, config)} | ({} if cuda else needs[0][1]), machine.host),
        Room("disk of run.output", {"run": files}, machine.disk),
    ]


def _turns(actors: dict[Role, Terms]) -> dict[str, dict[Role, Terms]]:
    """What lies on a GPU at a time, where engine and learner sleep by turns (`placement.sleep`)."""
    stays: dict[Role, tuple[str, ...]] = {"engine": ("context",), "learner": ("weights", "reference", "context")}
    left = {role: {term: v for term, v in actors[role].items() if term in stays[role]} for role in stays}
    return {f", {role} asleep": actors | {role: terms} for role, terms in left.items()}


def _gpus(config: Config) -> Iterator[dict[Role, int]]:
    """Actors of each kind of GPU: with a whole one, an actor has it to itself; the others fill theirs evenly."""
    actors_of = counts(config)
    shares = {role: share(config.placement, role)["GPU"] for role in actors_of}
    yield from ({role: 1} for role in actors_of if shares[role] >= 1)
    parts = [role for role in actors_of if 0 < shares[role] < 1]
    gpus = math.ceil(round(sum(shares[role] * actors_of[role] for role in parts), 4))
    if parts:
        yield {role: math.ceil(actors_of[role] / gpus) for role in parts}


def _bytes(config: Config) -> int:
    """Bytes of a number in the policy's dtype."""
    return int(getattr(torch, config.model.dtype).itemsize)


def _context(config: Config) -> float:
    return CONTEXT * GIB if config.placement.device == "cuda" else 0.0


def _gib(**terms: float) -> Terms:
    return {name: value / GIB for name, value in terms.items() if value}
