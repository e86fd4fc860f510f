"""What only a CUDA device can show: the varlen kernel, weights by CUDA IPC, and the whole path on one GPU, of a
toy; `benchmarks/gpu_hour.sh` takes it at the size of 3B."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from learner import vision_attention
from learner.weights import WeightSender, weights
from perception.config import LearnerConfig
from runtime.cluster import ROOT
from runtime.weights import open_ipc, view

pytestmark = pytest.mark.gpu


def test_windows_attend_as_on_the_cpu() -> None:
    torch.manual_seed(0)
    lengths = [64, 16, 64, 36]
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    query, key, value = torch.randn(3, 1, 4, sum(lengths), 64).unbind(0)
    module: Any = torch.nn.Identity()

    def attend(device: str, dtype: torch.dtype) -> torch.Tensor:
        parts = (x.to(device, dtype) for x in (query, key, value))
        out, _ = vision_attention.attend(
            module, *parts, None, cu_seq_lens_q=starts.to(device), max_length_q=64, scaling=64**-0.5
        )
        return out.float().cpu()

    assert torch.allclose(attend("cuda", torch.bfloat16), attend("cpu", torch.float32), atol=3e-2)


@ray.remote(num_gpus=0.1)
class _Receiver:
    def read(self, handles: dict[str, bytes]) -> list[int]:
        return open_ipc(handles).cpu().tolist()


def test_all_parameters_are_read_in_another_process_without_a_copy() -> None:
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False)
    try:
        model = torch.nn.Sequential(*(torch.nn.Linear(300, 600) for _ in range(4))).to("cuda", torch.bfloat16)
        sender = WeightSender(weights(model), LearnerConfig(), rank=0, device=torch.device("cuda"), transport="ipc")
        buckets = [sender.fill_bucket(index) for index in range(sender.open(("engine",)))]
        assert len(buckets) == 8  # none of them is a view
        receiver, received = _Receiver.remote(), {}
        for bucket in buckets:
            assert bucket is not None
            flat = torch.tensor(ray.get(receiver.read.remote(bucket.payload), timeout=60), dtype=torch.uint8)
            received |= {slot.name: view(flat, slot) for slot in bucket.slots}
        sender.release()
        for name, parameter in model.named_parameters():
            assert torch.equal(received[name], parameter.cpu()), name
    finally:
        ray.shutdown()


FIXED = ("recipe=quickstart", "algorithm.steps=2", "data.eval_samples=8", "run.name=gpu")
WHOLE_RUNS = {
    "mini": ("placement=one_gpu",),
    "colocated": ("placement=colocated", "rollout.enforce_eager=true"),
    "fp8": ("placement=one_gpu", "rollout.quantization=fp8"),
}


@pytest.mark.parametrize("overrides", WHOLE_RUNS.values(), ids=WHOLE_RUNS)
@pytest.mark.timeout(150)
def test_two_steps_on_one_gpu(overrides: tuple[str, ...], tmp_path: Path) -> None:
    settings = (*FIXED, *overrides, f"run.output={tmp_path}")
    command = [sys.executable, "-m", "launch.train", *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=140, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "gpu" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(abs(row["policy/ratio"] - 1) < 0.05 for row in rows)
