"""What only a CUDA device can show of the segmenter: the masks of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from perception.types import MaskPrompt
from reward_workers.segmenter import Segmenter
from tests import tiny_segmenter
from tests.builders import noise

pytestmark = pytest.mark.gpu


def test_cuda_agrees_with_cpu(tmp_path: Path) -> None:
    folder = tiny_segmenter.build(tmp_path).segmenter
    prompts = [
        MaskPrompt(box=(10, 12, 60, 70), points=((30, 40),)),
        MaskPrompt(box=(30, 5, 100, 90), points=((60, 50), (20, 20)), labels=(1, 0)),
        MaskPrompt(points=((20, 80),)),
    ]
    cpu, cuda = (Segmenter.load(folder, device) for device in ("cpu", "cuda"))
    exact, other = (one.decode(one.encode([noise(0, 90, 112)])[0], prompts)[0] for one in (cpu, cuda))
    torch.testing.assert_close(other.cpu(), exact, atol=1e-2, rtol=1e-2)
