"""Rollouts as pictures: rows of the rollout table become what the template shows."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import cv2
import numpy as np

from perception.masks import decode
from perception.types import Rle

MAX_SIDE = 448
"""Larger images are shown smaller; overlays keep the original's coordinates."""
_LOSSLESS_SIDE = 256
MAX_TEXT = 4000

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """One line of a reward's breakdown."""

    name: str
    raw: float | None
    weight: float | None
    points: float | None
    """What it adds to the reward; None for what is only measured."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One trajectory, ready to be drawn. Coordinates in original pixels."""

    index: int
    text: str
    tokens: int
    reward: float | None
    advantage: float | None
    parts: tuple[Part, ...]
    failure: str | None
    failure_detail: str | None
    boxes: tuple[tuple[float, float, float, float], ...]
    """x, y, width, height."""
    points: tuple[tuple[float, float], ...]
    mask: str
    """SVG path, empty where nothing was segmented."""
    iou: float | None


@dataclass(frozen=True, slots=True)
class Picture:
    """One question about one image, its truth and its attempts, best reward first."""

    step: int
    sample_id: str
    task: str
    question: str
    image: str | None
    """data: URI, None where the bytes do not decode."""
    height: int
    width: int
    truth_boxes: tuple[tuple[float, float, float, float], ...]
    truth_masks: tuple[str, ...]
    truth_count: int
    attempts: tuple[Attempt, ...]


def pictures(rows: Sequence[Row], reward: Mapping[str, Any]) -> list[Picture]:
    """Group consecutive rows of one sample. `reward` is the run's reward settings (`RewardConfig` as a dict)."""
    return [_picture(list(group), reward) for _, group in groupby(rows, key=lambda row: row["sample_id"])]


def printable(text: str) -> str:
    """The text with control and direction-changing characters spelled out, cut at MAX_TEXT."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else f"\\u{ord(c):04x}" for c in text[:MAX_TEXT])
    return shown + (f"\n… {len(text) - MAX_TEXT:,} more characters" if len(text) > MAX_TEXT else "")


def breakdown(row: Row, reward: Mapping[str, Any]) -> tuple[Part, ...]:
    """How the reward came about: weight x raw value per component; ranks are only known as their sum.

    What the components do not explain (ranks, the rule for failed answers) is a line of its own, so that the points
    always add up to the reward. Measured but unrewarded metrics follow without points.
    """
    metrics = row["metrics"]
    ranked = reward["ranked"] if reward["rank"] else {}
    plain = reward["components"] | ({} if reward["rank"] else reward["ranked"])
    parts = [Part(n, metrics.get(n), w, w * metrics[n] if n in metrics else None) for n, w in plain.items()]
    parts += [Part(name, metrics.get(name), weight, None) for name, weight in ranked.items()]
    if row["reward"] is None:
        parts = [Part(part.name, part.raw, None, None) for part in parts]
    else:
        rest = row["reward"] - sum(part.points or 0.0 for part in parts)
        if ranked or abs(rest) > 1e-6:
            parts.append(Part("rule for failed answers" if row["failure"] else "by rank", None, None, rest))
    rewarded = plain.keys() | ranked.keys()
    parts += [Part(name, value, None, None) for name, value in sorted(metrics.items()) if name not in rewarded]
    return tuple(parts)


def _picture(rows: list[Row], reward: Mapping[str, Any]) -> Picture:
    head = rows[0]
    height, width = head["height"], head["width"]
    attempts = [_attempt(row, reward) for row in rows]
    attempts.sort(key=lambda attempt: -(attempt.reward or 0.0))
    return Picture(
        step=head["step"],
        sample_id=head["sample_id"],
        task=head["task"],
        question=printable(head["question"]),
        image=_data_uri(head["image"]["bytes"]),
        height=height,
        width=width,
        truth_boxes=_corner_and_size(head["truth_boxes"]),
        truth_masks=tuple(_outline(counts, height, width) for counts in head["truth_masks"]),
        truth_count=len(head["truth_boxes"]),
        attempts=tuple(attempts),
    )


def _attempt(row: Row, reward: Mapping[str, Any]) -> Attempt:
    return Attempt(
        index=row["index"],
        text=printable("\n⟶ next turn\n".join(row["turns"])),
        tokens=row["response_tokens"],
        reward=row["reward"],
        advantage=row["advantage"],
        parts=breakdown(row, reward),
        failure=row["failure"],
        failure_detail=printable(row["failure_detail"]) if row["failure_detail"] else None,
        boxes=_corner_and_size(row["boxes"]),
        points=tuple((x, y) for x, y in row["points"]),
        mask=_outline(row["mask"], row["height"], row["width"]) if row["mask"] else "",
        iou=next((row["metrics"][name] for name in ("mask_iou", "box_iou") if name in row["metrics"]), None),
    )


def _corner_and_size(boxes: Sequence[Sequence[float]]) -> tuple[tuple[float, float, float, float], ...]:
    return tuple((x1, y1, max(0.0, x2 - x1), max(0.0, y2 - y1)) for x1, y1, x2, y2 in boxes)


def _outline(counts: str, height: int, width: int) -> str:
    """SVG path along the edges of a mask, holes included (fill-rule evenodd)."""
    mask = decode(Rle(height=height, width=width, counts=counts.encode("ascii"))).astype(np.uint8)
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    # A contour runs through pixel centres; a pixel's centre lies at +0.5.
    return "".join(
        "M" + "L".join(f"{x + 0.5:g} {y + 0.5:g}" for x, y in contour.reshape(-1, 2).tolist()) + "Z"
        for contour in contours
    )


def _data_uri(encoded: bytes) -> str | None:
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR) if encoded else None
    if image is None:
        return None
    scale = MAX_SIDE / max(image.shape[:2])
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    small = max(image.shape[:2]) <= _LOSSLESS_SIDE
    kind, options = ("png", []) if small else ("webp", [cv2.IMWRITE_WEBP_QUALITY, 82])
    _, data = cv2.imencode(f".{kind}", image, options)
    return f"data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode('ascii')}"
