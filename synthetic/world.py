"""The synthetic world on disk: a COCO-format data set with referring expressions, scenes drawn from seeds."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from perception import masks
from perception.config.fields import Natural, Positive
from perception.datasets.objects import TrueObject
from synthetic import coco_writer
from synthetic.scenes import SHIFTED, WORLD, SceneStyle, ask, generate

SPLITS = {"train": (0, WORLD), "eval": (500_000_000, WORLD), "shifted": (600_000_000, SHIFTED)}
"""First seed and style of each split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Settings of `python -m launch.world`, and what it does."""

    out: Path = Path("data/world")
    train: Positive = 4096
    eval: Positive = 256
    """Scenes of `eval.json`, and of `shifted.json`."""
    side: Positive = 224
    """Side of every image, in pixels."""
    seed: Natural = 0

    def write(self) -> None:
        counts = {"train": self.train, "eval": self.eval, "shifted": self.eval}
        for split, (first, style) in SPLITS.items():
            seeds = range(first + self.seed, first + self.seed + counts[split])
            coco_writer.write(self.out / f"{split}.json", records(seeds, replace(style, side=self.side)))


def write(out: Path, **sizes: int) -> None:
    """Write `World(out=out, **sizes)`."""
    World(out=out, **sizes).write()


def records(seeds: range, style: SceneStyle) -> Iterator[coco_writer.Scene]:
    """One image and one question per seed."""
    for seed in seeds:
        scene = generate(seed, style)
        question = ask(scene, np.random.default_rng(seed), style)
        ok, png = cv2.imencode(".png", cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR))
        assert ok, f"scene {seed} could not be encoded"
        yield coco_writer.Scene(
            image=png.tobytes(),
            height=style.side,
            width=style.side,
            question=question.text,
            task=question.task,
            objects=[
                TrueObject(box=seen.box, point=seen.point, mask=masks.encode(seen.mask), label=seen.attributes["shape"])
                for seen in (scene.objects[i] for i in question.targets)
            ],
        )
