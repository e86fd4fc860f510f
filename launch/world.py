"""Write the synthetic world to disk as a COCO-format data set with referring expressions.

    python -m launch.world [out=data/world] [train=4096] [eval=256] [side=112] [seed=0]

The training scenes and the held-out scenes come from different seeds; the same arguments write the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from launch.arguments import call
from perception.datasets import coco
from perception.scenes import SceneStyle, ask, generate

EVAL_SEED = 500_000_000


def write(out: Path = Path("data/world"), train: int = 4096, eval: int = 256, side: int = 112, seed: int = 0) -> None:
    style = SceneStyle(side=side, max_objects=3)
    for split, count, first in (("train", train, seed), ("eval", eval, EVAL_SEED + seed)):
        coco.write(out / f"{split}.json", records(range(first, first + count), style))


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
            masks=[scene.objects[i].mask for i in question.targets],
            boxes=[scene.objects[i].box for i in question.targets],
            points=[scene.objects[i].point for i in question.targets],
            labels=[scene.objects[i].shape for i in question.targets],
        )


if __name__ == "__main__":
    call(write)
