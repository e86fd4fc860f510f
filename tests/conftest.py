"""Every test runs offline, on two threads at most, and without a GPU unless `-m gpu` asks for one."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from runtime.loopback import confine_ray

ROOT = Path(__file__).resolve().parents[1]
gc.disable()  # until all is imported: little of it is garbage

# Before any test module imports torch, ray or wandb: these are read once.
os.environ.update(
    HF_HUB_OFFLINE="1",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_worker_niceness="0",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
)
for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
# A test starts the Ray it needs; one that happens to be named here is not ours.
os.environ.pop("RAY_ADDRESS", None)
confine_ray()
if "gpu" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


TOGETHER = ("test_engine.py", "test_rollout_pool.py"), ("test_learner.py", "test_learner_options.py")
"""Files in tests/stack that share an engine or learner ranks."""

# How long an example takes is the machine's affair.
settings.register_profile("relook", deadline=None, max_examples=60)
settings.load_profile("relook")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A process takes whole files, and those of `TOGETHER` one after the other."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return next((group[0] for group in TOGETHER if Path(file).name in group), file)

    return Files(config, log)


def pytest_collection_finish() -> None:
    """What was imported stays: looking for garbage need not go through it each time."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def assets() -> Path:
    """The models shipped with the repository."""
    return ROOT / "assets"
