"""Write the synthetic world to disk as a COCO-format data set with referring expressions.

    python -m launch.world [out=data/world] [train=4096] [eval=256] [side=224] [seed=0]

`train.json` and `eval.json` are scenes of one kind, `shifted.json` holds harder ones (`perception.scenes.SHIFTED`), all
from different seeds. The same arguments write the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from launch.run.command_line import call
from perception import masks
from perception.datasets import coco
from perception.datasets.objects import TrueObject
from perception.scenes import SHIFTED, WORLD, SceneStyle, ask, generate

EVAL_SEED = 500_000_000
SHIFTED_SEED = 600_000_000


def write(out: Path = Path("data/world"), train: int = 4096, eval: int = 256, side: int = 224, seed: int = 0) -> None:
    splits = (("train", train, 0, WORLD), ("eval", eval, EVAL_SEED, WORLD), ("shifted", eval, SHIFTED_SEED, SHIFTED))
    for split, count, first, style in splits:
        seeds = range(first + seed, first + seed + count)
        coco.write(out / f"{split}.json", records(seeds, replace(style, side=side)))


def records(seeds: range, style: SceneStyle) -> Iterator[coco.Record]:
    """One image and one question per seed."""
    for seed in seeds:
        scene = generate(seed, style)
        question = ask(scene, np.random.default_rng(seed), style)
        ok, png = cv2.imencode(".png", cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR))
        assert ok, f"scene {seed} could not be encoded"
        yield coco.Record(
            image=png.tobytes(),
            height=style.side,
            width=style.side,
            question=question.text,
            task=question.task,
            objects=[
                TrueObject(box=seen.box, point=seen.point, mask=masks.encode(seen.mask), label=seen.shape)
                for seen in (scene.objects[i] for i in question.targets)
            ],
        )


if __name__ == "__main__":
    call(write)
