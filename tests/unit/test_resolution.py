"""Guards `model.min_pixels` and `model.max_pixels`: prompt, answer frame, learner and exported files agree on the size
of an image; families that cannot be told refuse. The engine's side is in `tests/stack/test_pixels.py`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoProcessor

from launch.run import checks
from launch.run.prompts import PromptMaker, read_policy_spec
from learner.export import limit_pixels
from learner.families import family_of
from perception.config import ModelConfig
from perception.errors import UserError
from perception.types import PolicySpec
from rollout.engine import engine_args
from tests import builders, tiny_families
from tests.builders import changed

SQUARE = 28
LIMITS = [
    ((None, None), (56 * 56, 224 * 224)),
    ((None, 6000), (56 * 56, 6000)),
    ((90_000, 200_000), (90_000, 200_000)),
    ((20_000, None), (20_000, 224 * 224)),
]
SIZES = [(56, 56), (100, 300), (500, 333), (3000, 4000)]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_families.build(request.param, tmp_path_factory.mktemp(request.param)).path)


def model(source: Path, given: tuple[int | None, int | None], **changes: Any) -> ModelConfig:
    return ModelConfig(path=str(source), segmenter="", min_pixels=given[0], max_pixels=given[1], **changes)


def picture(spec: PolicySpec, height: int, width: int) -> Any:
    """What the learner makes of an image of this size."""
    config = AutoConfig.from_pretrained(spec.path)
    family = family_of(config.model_type)(spec, config, lambda handle: b"")
    return family.prepare("", torch.zeros(3, height, width, dtype=torch.uint8))


@pytest.mark.parametrize(("given", "limits"), LIMITS)
def test_prompt_and_learner_resize_alike(
    source: Path, given: tuple[int | None, int | None], limits: tuple[int, int]
) -> None:
    maker = PromptMaker(model(source, given, answer_frame="resized"), {})
    spec = read_policy_spec(model(source, given))
    assert spec.pixels == (limits if any(given) else None)
    for height, width in SIZES:
        tall, wide = maker.answer_frame(height, width)
        assert tall % SQUARE == wide % SQUARE == 0
        assert limits[0] <= tall * wide <= limits[1]
        assert abs(tall / wide - height / width) < 0.25 * height / width
        tokens = maker.image_tokens(height, width)
        assert tokens == tall * wide // SQUARE**2
        made = picture(spec, height, width)
        assert len(made.tokens) == tokens and made.grid.tolist() == [1, tall // 14, wide // 14]


def test_an_engine_is_told_only_what_was_set(source: Path) -> None:
    rollout = builders.config().rollout
    plain, limited = (engine_args(read_policy_spec(model(source, given)), rollout) for given, _ in LIMITS[:2])
    assert plain.mm_processor_kwargs is None
    assert limited.mm_processor_kwargs == {"size": {"shortest_edge": 56 * 56, "longest_edge": 6000}}


FORMS: dict[str, Any] = {
    "one file, transformers 5": lambda images: {"processor_config.json": {"image_processor": images}},
    "released Qwen2.5-VL": lambda images: {
        "preprocessor_config.json": {k: v for k, v in images.items() if k != "size"}
        | {"min_pixels": 3136, "max_pixels": 12845056}
    },
    "released Qwen3-VL": lambda images: {
        "preprocessor_config.json": images | {"size": {"shortest_edge": 65536, "longest_edge": 16777216}}
    },
    "both ways in one": lambda images: {"preprocessor_config.json": images | {"min_pixels": 3136, "max_pixels": 9999}},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_exported_files_say_it(source: Path, form: Any, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    for name, content in form(settings["image_processor"]).items():
        (tmp_path / "processor_config.json").write_text(json.dumps(settings | {"image_processor": {}}))
        (tmp_path / name).write_text(json.dumps(settings | content if name == "processor_config.json" else content))
        limit_pixels(tmp_path / name, (4000, 7000))
    (tmp_path / "processor_config.json").write_text(
        json.dumps({k: v for k, v in json.loads((tmp_path / "processor_config.json").read_text()).items() if v})
    )
    read = AutoProcessor.from_pretrained(tmp_path, backend="torchvision").image_processor
    assert (read.size["shortest_edge"], read.size["longest_edge"]) == (4000, 7000)
    grid = read(images=[torch.zeros(3, 900, 700, dtype=torch.uint8)], return_tensors="pt")["image_grid_thw"]
    assert 4000 <= int(grid.prod()) * 14 * 14 <= 7000


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl"])
@pytest.mark.parametrize("setting", ["min_pixels", "max_pixels"])
def test_families_without_such_limits_refuse(family: str, setting: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    settings = changed(builders.config(tmp_path), "model", path=str(tmp_path))
    checks.check_family(settings)
    with pytest.raises(UserError, match=rf"model\.min_pixels, model\.max_pixels: {family} has no") as told:
        checks.check_family(changed(settings, "model", **{setting: 5000}))
    assert "\n" not in str(told.value)
