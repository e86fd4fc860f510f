"""Guards the longest prompt before anything starts: text, image tokens, a template that shows the image."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.run.prompts import PromptMaker
from perception.config import ModelConfig
from perception.types import Sample
from tests import builders, tiny_policy


def sample(i: int, question: str = "the red circle", side: int = 112) -> Sample:
    return builders.sample(f"s{i}", question=question, height=side, width=side)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_policy.build(tmp_path_factory.mktemp("tiny")).path)


@pytest.mark.parametrize(("side", "tokens"), [(112, 16), (224, 64), (28, 4), (2000, 64)])
def test_image_tokens(tiny: Path, side: int, tokens: int) -> None:
    assert PromptMaker(ModelConfig(path=str(tiny), segmenter=""), {}).image_tokens(side, side) == tokens
