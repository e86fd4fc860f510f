"""Model families through the whole program, or through engine, learner and an update of all weights.

LLaVA-OneVision has a tokenizer, an image processor and a chat format of its own, in files as they are released;
Qwen3-VL is trained by adapters. And what cannot be trained is refused by name.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from runtime.cluster import ROOT
from tests import tiny_families

LIMIT_S = 240.0
SHARES = (("idefics3", "internvl", "qwen2_vl"), ("mistral3", "pixtral"))
"""Families in two processes side by side."""


def train(output: Path, model: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    world = [f"data.{part}={output}/world/{part}.json" for part in ("train", "eval")]
    small = (
        "recipe=quickstart",
        "look=none",
        "algorithm.steps=2",
        "algorithm.prompts_per_step=4",
        "algorithm.group_size=4",
        "learner.lr=1e-3",
        "learner.schedule=constant",
        "reward.unparsed_reward=null",  # most answers are cut short, and many hold a box all the same
        "rollout.max_new_tokens=24",
        "data.world_side=112",
        "data.world_train=16",
        "data.eval_samples=2",
        "model.answer_frame=null",
    )
    command = [sys.executable, "-m", "launch.train", *small, *world, "run.name=tiny", f"run.output={output}"]
    return subprocess.run(
        [*command, f"model.path={model}", *overrides],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        text=True,
        capture_output=True,
        timeout=LIMIT_S,
    )


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_families.build("llava_onevision", tmp_path_factory.mktemp("llava_onevision")).path)


def test_llava_onevision_trains(policy: Path, tmp_path: Path) -> None:
    done = train(tmp_path, policy)
    assert done.returncode == 0, done.stderr
    assert "parity: mean importance ratio 1.0000" in done.stdout
    first, second = (json.loads(line) for line in (tmp_path / "tiny/metrics.jsonl").read_text().splitlines())
    assert (first["policy/version"], second["policy/version"]) == (0, 1)
    # Every weight moved by about the learning rate, and the engine samples the second step from what the learner has.
    assert first["reward/std"] > 0 and first["policy/grad_norm"] > 0
    assert second["policy/logprob_mismatch"] < 1e-5
    assert first["failure/engine"] == first["failure/scorer"] == second["failure/engine"] == 0
    before = AutoModelForImageTextToText.from_pretrained(policy)
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny/policy")
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    still = {name for (name, old), new in pairs if torch.equal(old, new)}
    # The tower's last norm is not used; a key's bias shifts all scores alike, so its gradient is rounding.
    assert {name for name in still if "post_layernorm" not in name and "k_proj.bias" not in name} == set()
    with (
        safe_open(tmp_path / "tiny/policy/model.safetensors", "pt") as exported,
        safe_open(policy / "model.safetensors", "pt") as released,
    ):
        assert set(exported.keys()) == set(released.keys())
    assert AutoProcessor.from_pretrained(tmp_path / "tiny/policy").image_token == "<image>"


def test_a_model_that_cannot_be_trained_is_refused_by_name(policy: Path, tmp_path: Path) -> None:
    text_only = tmp_path / "llama"
    shutil.copytree(policy, text_only)
    settings = json.loads((policy / "config.json").read_text())["text_config"]
    (text_only / "config.json").write_text(json.dumps(settings))
    done = train(tmp_path, text_only)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "qwen2 is not supported: only image-text models are, such as qwen2_vl" in line


@pytest.fixture(scope="module")
def rounds() -> dict[str, Any]:
    def played(share: Sequence[str]) -> list[str]:
        command = [sys.executable, "-m", "tests.family_rounds", *share]
        done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True, timeout=LIMIT_S)
        return [line for line in done.stdout.splitlines() if line.startswith('{"family"')]

    with ThreadPoolExecutor(len(SHARES)) as side_by_side:
        lines = [line for share in side_by_side.map(played, SHARES) for line in share]
    return {found["family"]: found for found in map(json.loads, lines)}


@pytest.mark.parametrize("family", [family for share in SHARES for family in share])
def test_a_family_in_the_engine_and_in_the_learner_before_and_after_an_update(
    rounds: dict[str, Any], family: str
) -> None:
    found = rounds[family]
    assert max(found["before"], found["after"]) <= 1e-5 < 1e-2 < min(found["stale"], found["unseen"])
    assert found["same_rows"] and found["same_weights"] and found["looks"] == 1


def test_qwen3_vl_trains_by_adapters(tmp_path: Path) -> None:
    tiny_families.build("qwen3_vl", model := tmp_path / "model")
    done = train(tmp_path, model, "learner.lora.rank=4", "learner.checksum=true", "learner.parity_limit=1e-4")
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in (tmp_path / "tiny/metrics.jsonl").read_text().splitlines())
    assert first["policy/grad_norm"] > 0 and second["policy/version"] == 1
    assert max(one["policy/logprob_mismatch"] for one in (first, second)) < 1e-5
    assert json.loads((tmp_path / "tiny/policy/adapter/adapter_config.json").read_text())["r"] == 4
