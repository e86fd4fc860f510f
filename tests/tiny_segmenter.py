"""A real SAM2 of random weights in a directory: small enough for every test that wants masks of any kind."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from perception.config import ModelConfig
from reward_workers.segmenter import build as build_model
from synthetic.segmenter import mini_config


def build(path: Path) -> ModelConfig:
    """Save it under `path`; the same weights every time."""
    config = mini_config()
    OmegaConf.save(config, path / "config.yaml")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = build_model(config).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, path / "model.safetensors")
    return ModelConfig(path="unused", segmenter=str(path))
