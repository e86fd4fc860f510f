"""Guards that engine and learner see the same pixels under `model.min_pixels` and `model.max_pixels`: vLLM's processor,
built as the engine builds it, against the learner's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from launch.run.prompts import PromptMaker, read_policy_spec
from learner.families import family_of
from perception.config import ModelConfig
from rollout.engine import engine_args
from tests import tiny_families
from tests.trainer import CONFIG

LIMITS = [(None, None), (None, 6000), (90_000, 200_000)]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_families.build(request.param, tmp_path_factory.mktemp(request.param)).path)


@pytest.mark.parametrize("limits", LIMITS)
def test_the_engines_pixels_are_the_learners(source: Path, limits: tuple[int | None, int | None]) -> None:
    from vllm.multimodal import MULTIMODAL_REGISTRY

    model = ModelConfig(path=str(source), segmenter="", min_pixels=limits[0], max_pixels=limits[1])
    spec, maker = read_policy_spec(model), PromptMaker(model, {})
    settings: Any = engine_args(spec, CONFIG).create_model_config()
    engine: Any = MULTIMODAL_REGISTRY.create_processor(settings)
    config = AutoConfig.from_pretrained(spec.path)
    learner = family_of(config.model_type)(spec, config, lambda handle: b"")
    for height, width in ((84, 84), (100, 301), (700, 500)):
        image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        items = engine.info.parse_mm_data({"image": [Image.fromarray(image)]})
        found = engine([spec.image_token_id], mm_items=items, mm_uuid_items=None)
        mine = learner.prepare("", torch.tensor(image).permute(2, 0, 1))
        data = found["mm_kwargs"].get_data()
        assert torch.equal(data["image_grid_thw"][0], mine.grid)
        # vLLM leaves rescaling and normalisation to the model; a row holds a patch, channel by channel.
        images = learner.processor.image_processor
        mean, std = (torch.tensor(v).repeat_interleave(2 * 14 * 14) for v in (images.image_mean, images.image_std))
        bytes_of_mine = (mine.inputs["pixel_values"] * std + mean) * 255
        torch.testing.assert_close(bytes_of_mine, data["pixel_values"].float(), rtol=0, atol=1e-3)
        shown = found["prompt_token_ids"].count(spec.image_token_id)
        assert shown == len(mine.tokens) == maker.image_tokens(height, width)
