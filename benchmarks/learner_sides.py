"""What each side of `benchmarks.learner` does in its own process."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import learner_batch, trl_step
from benchmarks.turns import wait
from perception import metric_catalog as catalog
from perception.config import AlgorithmConfig, LearnerConfig, PlacementConfig, RolloutConfig
from perception.types import Group, PolicySpec
from tests import builders

OURS: dict[str, dict[str, Any]] = {
    "toy": {},
    "3b": {"micro_tokens": 8192},
    "7b": {"offload_optimizer": True, "checkpointing": "selective"},
}
LR = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What both sides are given."""

    policy: PolicySpec
    groups: list[Group]
    shape: str
    device: Literal["cpu", "cuda"]
    steps: int
    """Warm-up included."""
    threads: int
    rival_rows: int
    rival_checkpointing: bool


def learner_config(name: str, task: Task) -> LearnerConfig:
    """The settings of our own side, or of the rival that is our learner on padded rows."""
    cuda = task.device == "cuda"
    if name == "ours":
        return LearnerConfig(lr=LR, compile=cuda, **OURS[task.shape])
    shape = learner_batch.SHAPES[task.shape]
    rows = task.rival_rows * (shape.prompt_tokens + shape.answer_tokens)
    return LearnerConfig(
        lr=LR, rows="padded", micro_tokens=rows, checkpointing="on" if task.rival_checkpointing else "off"
    )


def serve_learner(link: Connection, name: str, task: Task) -> None:
    from learner import vision_attention
    from learner.rank import LearnerRank

    shape = learner_batch.SHAPES[task.shape]
    algorithm = AlgorithmConfig(steps=task.steps, prompts_per_step=shape.groups, group_size=shape.n, importance="none")
    config = builders.config(
        learner=learner_config(name, task),
        algorithm=algorithm,
        placement=PlacementConfig(name=task.device, device=task.device, threads=task.threads),
        rollout=RolloutConfig(max_new_tokens=shape.answer_tokens),
    )
    rank = LearnerRank(0, 1, task.policy, config)
    rank.start(*rank.open_store())
    if name == "padded_varlen":  # no setting of the learner: as it does for its packed rows
        rank._policy.model.config.vision_config._attn_implementation_internal = vision_attention.NAME
    groups = learner_batch.on_policy(task.groups, rank.logprobs(task.groups))
    for _ in range(task.steps):
        wait(link)
        began = time.perf_counter()
        metrics = rank.update([groups]).metrics
        seconds = time.perf_counter() - began
        figures = {
            "seconds": seconds,
            "grad_norm": metrics[catalog.GRAD_NORM],
            "mfu": metrics[catalog.MFU],
        }
        link.send(figures | {"peak_gib": peak_gib(task.device)})


def serve_trl(link: Connection, task: Task) -> None:
    torch.set_num_threads(task.threads)
    trl_step.train(
        task.policy,
        task.groups,
        device=task.device,
        steps=task.steps,
        lr=LR,
        rows=task.rival_rows,
        checkpointing=task.rival_checkpointing,
        wait=lambda: wait(link),
        done=lambda figures: link.send(figures | {"peak_gib": peak_gib(task.device)}),
    )


def serve(link: Connection, name: str, task: Task) -> None:
    """Figures of a step for every turn."""
    if name == "trl":
        serve_trl(link, task)
    else:
        serve_learner(link, name, task)


def peak_gib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    # Not getrusage: its maximum includes the process this one was started from.
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 2**20
