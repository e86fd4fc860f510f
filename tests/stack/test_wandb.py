"""W&B for real: an offline run, by its own process."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from launch.record import wandb_sink
from perception import metric_catalog as catalog
from perception.config import WandbConfig


def test_wandb_writes_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_sink, "CLOSE_TIMEOUT_S", 180.0)  # a busy machine starts W&B slowly
    sink = wandb_sink.WandbSink(WandbConfig(mode="offline"), tmp_path, {"lr": 1e-5})
    for step in range(1, 4):
        sink.log(step, {catalog.REWARD_MEAN: 0.1 * step, catalog.ENTROPY: math.nan})
    sink.close()
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 30  # its own process closes the file a moment after it says that the run is done
    while catalog.REWARD_MEAN.encode() not in written.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert catalog.REWARD_MEAN.encode() in written.read_bytes()
