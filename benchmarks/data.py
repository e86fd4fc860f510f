"""A COCO-sized file: seconds and memory to the first sample; and images per second from JPEG to the model's input.

    python -m benchmarks.data [--images 100000] [--annotations 800000] [--expressions 300000] [--rounds 3] [--json]

File: generated, polygons of 8 to 24 points, 2 % uncompressed run lengths. Ours: `perception.datasets.load` and the
first sample, its image probed and its masks drawn. Rival: `pycocotools.coco.COCO(file)`, which indexes the same
annotations and neither looks at an image nor knows of expressions. Each in a new process, in turns, from the page
cache; wall and CPU seconds after the imports, peak resident memory of the whole process; medians over the rounds.
`ratio` is of the CPU seconds: on shared cores they are steadier than the clock.

Input: photographs of 640x480 as JPEG bytes, on one core. Ours: `perception.images.decode` and the processor as
the learner's families use it. Rivals: the processor of transformers as it comes, on the PIL image, and the same with
the image processor of its backend "pil". The shapes of what they make are compared before anything is timed.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
from PIL import Image

from benchmarks.common import options, print_result

POLICY = Path(__file__).resolve().parents[1] / "assets" / "policy"
HEIGHT, WIDTH = 480, 640
PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}  # limits of an image, as Qwen2.5-VL is used


def photograph(seed: int, height: int, width: int) -> bytes:
    """JPEG bytes of a blurred random picture: it compresses as a photograph does."""
    rng = np.random.default_rng(seed)
    pixels = cv2.resize(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8), (width, height))
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def annotation(rng: np.random.Generator, key: int, image: int) -> dict[str, Any]:
    x, y, w, h = (int(value) for value in rng.integers(20, 200, 4))
    if key % 50 == 0:
        start, size = x * HEIGHT + y, w * HEIGHT
        segmentation: Any = {"size": [HEIGHT, WIDTH], "counts": [start, size, HEIGHT * WIDTH - start - size]}
    else:
        turns = np.linspace(0, 2 * np.pi, int(rng.integers(8, 25)), endpoint=False)
        outline = np.stack([x + w / 2 * (1 + np.cos(turns)), y + h / 2 * (1 + np.sin(turns))], 1)
        segmentation = [[round(value, 2) for value in outline.ravel().tolist()]]
    place = {"id": key, "image_id": image, "category_id": key % 80 + 1, "iscrowd": 0}
    return {**place, "bbox": [x, y, w, h], "area": w * h * 0.78, "segmentation": segmentation}


def entries(images: int, annotations: int, expressions: int) -> Iterator[tuple[str, Iterator[dict[str, Any]]]]:
    rng = np.random.default_rng(0)
    size = {"height": HEIGHT, "width": WIDTH, "license": 1, "date_captured": "2013-11-14 17:02:52"}
    yield "images", ({"id": i, "file_name": f"{i:012d}.jpg", **size} for i in range(1, images + 1))
    yield "annotations", (annotation(rng, i, i % images + 1) for i in range(1, annotations + 1))
    yield "categories", ({"id": i, "name": f"category {i}", "supercategory": "thing"} for i in range(1, 81))
    ask = "the object number {} from the left"
    yield (
        "expressions",
        (
            {"id": i, "image_id": i % images + 1, "question": ask.format(i % 97), "annotation_ids": [i]}
            for i in range(1, expressions + 1)
        ),
    )


def write(path: Path, *sizes: int) -> None:
    """The file, and the one image of which the first sample asks."""
    with path.open("w") as file:
        for index, (name, rows) in enumerate(entries(*sizes)):
            file.write(("{" if index == 0 else "],\n") + f'"{name}": [')
            for number, row in enumerate(rows):
                file.write(("," if number else "") + json.dumps(row))
        file.write("]}")
    first = 1 % sizes[0] + 1
    (path.parent / f"{first:012d}.jpg").write_bytes(photograph(0, HEIGHT, WIDTH))


def by_relook(path: str) -> Callable[[], object]:
    from perception.config import DataConfig
    from perception.datasets import load

    config = DataConfig(format="coco", train=path, eval=path)

    def run() -> object:
        data = load(config, path)
        assert len(data[0].target.masks) == 1
        return data

    return run


def by_pycocotools(path: str) -> Callable[[], object]:
    from pycocotools.coco import COCO

    return lambda: COCO(path)


def measure(side: Callable[[str], Callable[[], object]], path: str, found: Any) -> None:
    """In a process of its own: imports, then the clock."""
    run = side(path)
    began, cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools says what it does
        kept = run()
    seconds = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}
    found.send({**seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})
    del kept


def first_samples(path: Path, rounds: int) -> dict[str, dict[str, float]]:
    context = multiprocessing.get_context("spawn")
    sides = {"ours": by_relook, "pycocotools": by_pycocotools}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=measure, args=(side, str(path), theirs))
            process.start()
            theirs.close()
            taken[name].append(ours.recv())
            process.join()
    return {
        name: {key: round(median(one[key] for one in found), 2) for key in found[0]} for name, found in taken.items()
    }


def input_sides() -> dict[str, Callable[[bytes], Any]]:
    """JPEG bytes -> the model's input."""
    import torch
    from transformers import AutoImageProcessor, AutoProcessor

    from perception.images import decode

    torch.set_num_threads(1)
    ours = AutoProcessor.from_pretrained(POLICY, backend="torchvision", local_files_only=True)
    plain, slow = (AutoProcessor.from_pretrained(POLICY, local_files_only=True) for _ in range(2))
    slow.image_processor = AutoImageProcessor.from_pretrained(POLICY, backend="pil", local_files_only=True)

    def made(processor: Any, image: Any) -> Any:
        shown = {"text": [processor.image_token], "images": [image], "add_special_tokens": False}
        return processor(**shown, size=PIXELS, return_tensors="pt")

    def opened(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    return {
        "ours": lambda data: made(ours, torch.tensor(decode(data)).permute(2, 0, 1)),
        "processor": lambda data: made(plain, opened(data)),
        "processor_pil": lambda data: made(slow, opened(data)),
    }


def inputs_per_s(rounds: int, count: int) -> dict[str, float]:
    """Images a second and core, by CPU time."""
    sides, files = input_sides(), [photograph(seed, HEIGHT, WIDTH) for seed in range(count)]
    shapes = {name: run(files[0])["pixel_values"].shape for name, run in sides.items()}
    if len(set(shapes.values())) > 1:
        raise RuntimeError(f"the sides make inputs of different shapes: {shapes}")
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            began = time.process_time()
            for data in files:
                run(data)
            rates[name].append(count / (time.process_time() - began))
    return {name: round(median(found), 1) for name, found in rates.items()}


def main() -> None:
    arguments = options(
        __doc__,
        images=(100_000, "in the file"),
        annotations=(800_000, "in the file"),
        expressions=(300_000, "in the file"),
        rounds=(3, "of all sides; medians"),
        photographs=(20, "per side and round"),
    )
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instances.json"
        write(path, arguments.images, arguments.annotations, arguments.expressions)
        megabytes = path.stat().st_size / 2**20
        taken = first_samples(path, arguments.rounds)
    ours, rival = taken["ours"], taken["pycocotools"]
    rates = inputs_per_s(arguments.rounds, arguments.photographs)
    print_result(
        "data",
        ours,
        rival,
        round(ours["cpu_s"] / rival["cpu_s"], 3),
        {**vars(arguments), "file_mb": round(megabytes)},
        memory_ratio=round(ours["peak_mb"] / rival["peak_mb"], 3),
        images_per_s_and_core=rates,
    )


if __name__ == "__main__":
    main()
