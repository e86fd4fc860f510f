"""Warm start of the models the demo starts from, as `launch.sft` asks for it: the policy or the SAM2 model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from perception.config.fields import Natural, Positive, Rate
from synthetic.policy import SEED_BASE, SEEDS_PER_RUN, WarmStart, train_policy
from synthetic.prepare import read_tasks
from synthetic.scenes import stream
from synthetic.segmenter import TOOL_STYLE, train_tool


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStartSettings:
    """Settings of `python -m launch.sft`."""

    target: Literal["policy", "tool"] = "policy"
    out: Path | None = None
    """None: the directory of the shipped model."""
    steps: Positive | None = None
    batch: Positive | None = None
    lr: Rate | None = None
    """None: as the shipped model was trained."""
    seed: Natural = 0
    threads: Positive = 1


def sft(settings: WarmStartSettings) -> None:
    """Train the target and write it."""
    torch.set_num_threads(settings.threads)
    given = {name: value for name in ("steps", "batch", "lr") if (value := getattr(settings, name)) is not None}
    if settings.target == "policy":
        config = WarmStart(seed=settings.seed, **given)
        train_policy(settings.out or Path("assets/policy"), config, read_tasks("brief"))
    else:
        scenes = stream(SEED_BASE + settings.seed * SEEDS_PER_RUN, TOOL_STYLE)
        train_tool(settings.out or Path("assets/segmenter"), scenes, seed=settings.seed, **given)
