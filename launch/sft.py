"""Train the models the demo starts from, from random weights, on the synthetic world.

    python -m launch.sft                    # the policy: assets/policy
    python -m launch.sft target=tool        # the SAM2 model: assets/segmenter

`steps`, `batch`, `lr`, `seed` and `threads` may be given; their defaults are those of the shipped models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from launch.run.command_line import call
from launch.run.config import read_tasks
from launch.warm_start.policy import SEED_BASE, SEEDS_PER_RUN, WarmStart, train_policy
from launch.warm_start.segmenter import TOOL_STYLE, train_tool
from perception.scenes import stream


def sft(
    target: Literal["policy", "tool"] = "policy",
    out: Path | None = None,
    steps: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Train `target` and write it to `out`."""
    torch.set_num_threads(threads)
    if target == "policy":
        shipped = WarmStart()
        config = WarmStart(steps=steps or shipped.steps, batch=batch or shipped.batch, lr=lr or shipped.lr, seed=seed)
        train_policy(out or Path("assets/policy"), config, read_tasks("brief"), _say)
    else:
        train_tool(
            out or Path("assets/segmenter"),
            stream(SEED_BASE + seed * SEEDS_PER_RUN, TOOL_STYLE),
            steps=steps or 3600,
            batch=batch or 8,
            lr=lr or 2e-3,
            seed=seed,
            device="cpu",
            log=_say,
        )


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    call(sft)
