"""Guards what `launch.doctor` shows of a model, for every kind of family: image, tokens, stops, frame; that what does
not agree is one line; and by which figures `--deep` tells that a change has come to engine and learner alike."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from launch import doctor
from launch.run import examine
from launch.run.prompts import PromptMaker
from learner.pool import reported
from perception import metric_catalog as catalog
from perception.config import ModelConfig, TaskConfig
from perception.errors import UserError
from perception.types import Group, ImageHandle, Prompt, SamplingSpec
from runtime.objects import handle
from synthetic.example import example
from tests import builders, tiny_families
from tests.builders import group, trajectory, turn

FORM = TaskConfig(system=None, template="Find {question}.", inline="Look at {question}.", again="Again.")
FAMILIES = {
    # 9 x 6 squares of 28 pixels: 0.84 of 300 x 200; parts of 56 x 56, between marks or with the ends of their rows
    "qwen2_5_vl": ("252 x 168: 54", "<|image_pad|> x 54", "<|im_end|>", "25 34 76 84", "252 x 168"),
    "qwen3_vl": ("252 x 168: 54", "<|image_pad|> x 54", "<|im_end|>", "100 200 300 500", "1000 x 1000"),
    "llava_onevision": ("56 x 56: 70", "<image> x 70", "</s>", "100 200 300 500", "1000 x 1000"),
    "internvl": ("56 x 56: 22", "<IMG_CONTEXT> x 20", "</s>", "100 200 300 500", "1000 x 1000"),
}
"""Shown as, the image's tokens, the end of an answer, and the box in which frame."""


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_families.build(request.param, folder)
    return request.param, folder


def explained(folder: Path, inline: bool = False, **model: Any) -> dict[str, str]:
    maker = PromptMaker(ModelConfig(path=str(folder), segmenter="", **model), {"segment": FORM})
    return examine.explained(maker, example("segment"), inline)


def test_an_example_is_shown_as_the_family_gets_it(policy: tuple[str, Path]) -> None:
    family, folder = policy
    image, tokens, end, box, frame = FAMILIES[family]
    found = explained(folder)
    assert found["family"] == family
    assert found["image"] == f"300 x 200 pixels, resized to {image} tokens"
    assert "Find the red rectangle." in found["prompt"] and found["prompt"].count(tokens.split()[0]) == 1
    assert " ".join(found["tokens"].split()).count(f":{tokens} ") == 1
    assert re.fullmatch(rf"\d+:{re.escape(end)}", found["stops"])
    assert found["frame"] == f"box 30 40 90 100 of the image becomes {box} in this model's frame, {frame}"
    answered = json.loads(found["ideal"].removeprefix("<think>left</think><answer>").removesuffix("</answer>"))
    assert answered[0]["bbox_2d"] == [int(number) for number in box.split()]
    assert "Look at the red rectangle." in explained(folder, inline=True)["prompt"]
    set_by_hand = explained(folder, answer_frame="thousand")["frame"]
    assert set_by_hand.endswith("becomes 100 200 300 500 in this model's frame, 1000 x 1000")


def test_what_the_template_opens_is_seen_in_the_prompt(tmp_path: Path) -> None:
    tiny_families.build("qwen3_vl", tmp_path)
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\n{% endif", "assistant\n<think>\n{% endif"))
    found = explained(tmp_path)
    assert found["prompt"].endswith("<think>\n") and found["ideal"].startswith("<think>left")


def test_the_command_shows_it_and_what_does_not_agree_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = f"model.path={tiny_families.build('qwen3_vl', tmp_path).path}"
    assert doctor.main([path, "rollout.max_model_len=400"]) == 0
    lines = capsys.readouterr().out.splitlines()
    subjects = [line.split()[0] for line in lines if line[:1].strip() and not line.startswith("<")]
    assert subjects == ["family", "image", "prompt", "tokens", "stops", "ideal", "frame"]
    assert all(len(line) <= 120 for line in lines)
    for words, why in {
        ("rollout.max_model_len=4097",): "but config.json has 4096 positions",
        ("rollout.max_model_len=200",): "is too short; raise it to 263 = 113 text tokens + 54 image tokens",
        ("model.answer_frame=resized",): "qwen3_vl answers in 0..1000",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            doctor.main([path, *words])
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and why in err


@pytest.mark.parametrize(("address", "found"), [("local", "none"), ("", "none"), ("10.0.0.1:6379", "RAY_ADDRESS=10")])
def test_a_local_ray_is_no_cluster(address: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(doctor, "_torchvision", lambda: doctor.Finding("ok", "torchvision", "imports"))
    cluster = next(one for one in doctor.examine() if one.subject == "cluster")
    assert cluster.detail.startswith(found)


@pytest.mark.parametrize(
    ("engine", "learner", "fine"),
    [
        ((0.5, 0.2), (0.5, 0.2), True),
        ((0.5, 0.2), (0.501, 0.201), True),  # alike within a hundredth of the move
        ((0.0, 0.0), (0.5, 0.2), False),  # stale in the engine,
        ((0.5, 0.2), (0.0, 0.0), False),  # in the learner,
        ((0.0, 0.0), (0.0, 0.0), False),  # in both,
        ((0.5, 0.2), (0.45, 0.2), False),  # in a part of the weights
        ((3e-6, 0.0), (3e-6, 0.0), False),  # no more than the noise
        ((np.nan, 0.2), (0.5, 0.2), False),
        ((0.5, 0.2), (0.5, np.nan), False),
    ],
)
def test_a_change_must_come_to_both_alike(
    engine: tuple[float, float], learner: tuple[float, float], fine: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    before = np.array([-1.0, -2.0])
    told = group(trajectory(turn("a", (1, 2), logprobs=tuple(before + engine))), about=builders.prompt())
    assert examine._moved("picture", told, before + learner, before, noise=1e-6) is fine
    assert capsys.readouterr().out.startswith("ok    picture: " if fine else "fail  picture: ")


class Half:
    """An engine or a learner in which a token's log-prob is a product of picture and weights."""

    def __init__(self, keeps: bool = False, weights: float = 1.0) -> None:
        self.keeps, self.weights, self.first = keeps, weights, ""

    def logprobs(self, image: ImageHandle, tokens: tuple[int, ...]) -> tuple[float, ...]:
        self.first = self.first or image.key
        picture = int((self.first if self.keeps else image.key)[:4], 16) / 2**16
        return tuple(-self.weights * (1 + picture) * token for token in tokens)


def a_system(engine: Half, learner: Half, sends: bool) -> Any:
    async def generate(prompt: Prompt, sampling: SamplingSpec) -> Group:
        logprobs = engine.logprobs(prompt.images[0], (1, 2))
        return group(trajectory(turn("left", (1, 2), images=prompt.images, logprobs=logprobs)), about=prompt)

    async def logprobs(groups: list[Group]) -> np.ndarray:
        turns = [turn for group in groups for one in group.trajectories for turn in one.turns]
        assert [turn.images for turn in turns] == [group.prompt.images for group in groups]
        return np.concatenate([learner.logprobs(turn.images[0], turn.token_ids) for turn in turns])

    async def parity(groups: list[Group]) -> dict[str, float]:
        apart = float(np.abs(reported(groups) - await logprobs(groups)).mean())
        return {catalog.LOGPROB_MISMATCH: apart, catalog.LOGPROB_MISMATCH_MAX: apart, catalog.RATIO: 1.0}

    async def perturb(back: bool = False) -> None:
        learner.weights *= 1 / 1.1 if back else 1.1

    async def sync(version: int) -> None:
        engine.weights = learner.weights if sends else engine.weights

    return SimpleNamespace(
        config=builders.config(),
        version=0,
        engines=SimpleNamespace(generate=generate),
        learner=SimpleNamespace(logprobs=logprobs, parity=parity, perturb=perturb),
        prompt=lambda asked, step, place: builders.prompt(asked, images=(handle(asked),)),
        sync_weights=sync,
    )


@pytest.mark.parametrize(
    ("engine", "learner", "sends", "told"),
    [
        (Half(), Half(), True, ["ok", "ok"]),
        (Half(keeps=True), Half(), True, ["fail", "ok"]),
        (Half(), Half(keeps=True), True, ["fail", "ok"]),
        (Half(), Half(), False, ["ok", "fail"]),
        (Half(keeps=True), Half(keeps=True), False, ["fail", "fail"]),
    ],
)
def test_a_half_that_keeps_a_picture_or_weights_is_told(
    engine: Half, learner: Half, sends: bool, told: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fine = asyncio.run(examine.agree(a_system(engine, learner, sends), example("segment")))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("ok", "fail"))]
    assert [line.split()[1] for line in lines] == ["picture:", "weights:"]
    assert [line.split()[0] for line in lines] == told and fine is ("fail" not in told)
    assert learner.weights == pytest.approx(1.0), "the learner is left as it was"


def test_two_that_differ_from_the_start_are_the_parity_gates(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"engine and learner disagree: .* Usual causes: other weights in the two"):
        asyncio.run(examine.agree(a_system(Half(weights=2.0), Half(), sends=True), example("segment")))
    assert "fail  picture: " in capsys.readouterr().out
