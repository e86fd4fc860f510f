"""Our learner's optimizer step against a rival's, on one batch and one policy of random weights.

    python -m benchmarks.learner --device cpu --shape toy --rival trl --json
    python -m benchmarks.learner --device cuda --shape 3b --rival padded --json

Ours: a `LearnerRank` on packed rows. Rivals: `padded`, the same learner on one row per trajectory with transformers'
own forward pass; `padded_varlen`, the same rows with our attention in the vision tower; `trl`, TRL's GRPOTrainer
(`benchmarks.trl_step`). Every step starts with images and sampled ids and ends after AdamW. Each side has a process of
its own, both with the allocator settings of our CPU learner. On the CPU the two take turns, the one that begins
alternating; on CUDA, where they share the device's memory, one follows the other. Medians over the steps after the
warm-up. `peak_gib`: device memory, or on the CPU the resident memory of the side's process, its libraries included.
`mfu` counts only arithmetic that sharing prompts and images cannot avoid, the same for both. The run fails if the first
step's gradient norms disagree: both must have done the same work.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import learner_batch, trl_step
from benchmarks.common import parser, print_result
from benchmarks.learner_sides import Task, learner_config, serve
from benchmarks.turns import Side, take_turns
from launch.record.environment import version_of
from runtime.cluster import KEEP_FREED_MEMORY

RIVALS = ("padded", "padded_varlen", "trl")
RIVAL_ROWS = {"toy": 8, "3b": 4, "7b": 2}
"""Rows per forward pass of a rival: toy, TRL's fastest; 3b and 7b, what should fit an H200 without recomputing."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Relative, of gradient norms."""


def measure(sides: Sequence[str], task: Task) -> dict[str, list[dict[str, float]]]:
    """Figures of every step of each side; they take turns."""
    return take_turns({name: Side(name, serve, name, task) for name in sides}, task.steps)


def summary(steps: Sequence[dict[str, float]], warm_up: int, samples: int) -> dict[str, float]:
    """Medians, the first step's gradient norm and the last one's peak."""
    middle = {name: median(step[name] for step in steps[warm_up:]) for name in steps[0]}
    figures = {"samples_per_s": samples / middle["seconds"], **middle}
    if "train_s" in middle:
        figures["train_only_samples_per_s"] = samples / middle.pop("train_s")
    return figures | {"grad_norm": steps[0]["grad_norm"], "peak_gib": steps[-1]["peak_gib"]}


def compare(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, float], dict[str, float], dict[str, Any]]:
    """Figures of our side and the rival's, and the settings. Raises RuntimeError if they did not do the same work."""
    shape = learner_batch.SHAPES[arguments.shape]
    dtype = "bfloat16" if arguments.device == "cuda" else "float32"
    learner_batch.write_policy(shape, folder, dtype)
    policy = learner_batch.read_policy(folder, dtype)
    task = Task(
        policy=policy,
        groups=learner_batch.make_groups(shape, policy),
        shape=arguments.shape,
        device=arguments.device,
        steps=arguments.warm_up + arguments.steps,
        threads=arguments.threads,
        rival_rows=arguments.rival_rows or RIVAL_ROWS[arguments.shape],
        rival_checkpointing=arguments.rival_checkpointing,
    )
    if arguments.device == "cpu":
        taken = measure(("ours", arguments.rival), task)
    else:
        taken = measure(("ours",), task) | measure((arguments.rival,), task)
    samples = shape.groups * shape.n
    ours, rival = (summary(taken[name], arguments.warm_up, samples) for name in ("ours", arguments.rival))
    if abs(ours["grad_norm"] / rival["grad_norm"] - 1.0) > TOLERANCE[dtype]:
        raise RuntimeError(
            f"gradient norm of the first step: ours {ours['grad_norm']:.6g}, {arguments.rival} "
            f"{rival['grad_norm']:.6g}; the two did not do the same work"
        )
    rival["mfu"] = ours["mfu"] * rival["samples_per_s"] / ours["samples_per_s"]
    settings = {
        **dataclasses.asdict(shape),
        **{name: value for name, value in vars(arguments).items() if name != "json"},
        "dtype": dtype,
        "rival_rows": task.rival_rows,
        "learner": dataclasses.asdict(learner_config("ours", task)),
        "trl": version_of("trl"),
    }
    return ours, rival, settings


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--shape", choices=tuple(learner_batch.SHAPES), default="toy")
    made.add_argument("--rival", choices=RIVALS, default="padded")
    made.add_argument("--steps", type=int, default=7)
    made.add_argument("--warm-up", type=int, default=2)
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side, on the CPU")
    made.add_argument("--rival-rows", type=int, help=f"per forward pass of the rival; default by shape: {RIVAL_ROWS}")
    made.add_argument("--rival-checkpointing", action="store_true", help="the rival recomputes activations")
    arguments = made.parse_args()
    if arguments.rival == "trl" and not find_spec("trl"):
        made.error(f"--rival trl needs TRL: pip install {trl_step.REQUIREMENT}")
    shape = learner_batch.SHAPES[arguments.shape]
    if arguments.steps < 1 or arguments.warm_up < 0 or arguments.threads < 1:
        made.error("--steps and --threads must be at least 1, --warm-up at least 0")
    if arguments.rival_rows is not None and (arguments.rival_rows < 1 or shape.groups * shape.n % arguments.rival_rows):
        made.error(f"--rival-rows must divide the batch's {shape.groups * shape.n} rows, not {arguments.rival_rows}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: torch finds no CUDA device")
    os.environ |= {
        "DS_ACCELERATOR": arguments.device,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(arguments.threads),
        **KEEP_FREED_MEMORY,
    }
    with tempfile.TemporaryDirectory() as folder:
        ours, rival, settings = compare(arguments, Path(folder))
    print_result("learner", ours, rival, ours["samples_per_s"] / rival["samples_per_s"], settings)


if __name__ == "__main__":
    main()
