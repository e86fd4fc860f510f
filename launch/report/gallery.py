"""Rollouts as pictures: rows of the rollout table become what the template shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from launch.report.drawing import Box, Point, corner_and_size, data_uri, decoded, mask_of, outline
from perception import views
from perception.config import weights

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """An answer, ready to be drawn. Coordinates in original pixels."""

    text: str
    boxes: tuple[Box, ...]
    points: tuple[Point, ...]
    mask: str
    """SVG path, empty where nothing was segmented."""
    iou: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass(Answered):
    """One look of a trajectory that looked more than once."""

    confidence: float | None
    kept: bool
    view: Box | None
    """What was shown enlarged; None: the whole image."""
    crop: str | None
    """data: URI of the view as the policy was shown it; None without a view, or where the image does not decode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt(Answered):
    """One trajectory."""

    index: int
    tokens: int
    reward: float | None
    advantage: float | None
    parts: tuple[Part, ...]
    failure: str | None
    failure_detail: str | None
    passes: tuple[Pass, ...]
    """Empty where there was only one."""


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
    truth_boxes: tuple[Box, ...]
    truth_masks: tuple[str, ...]
    truth_count: int
    attempts: tuple[Attempt, ...]


def pictures(rows: Sequence[Row], reward: Mapping[str, Any], pixels: int) -> list[Picture]:
    """Group consecutive rows of one sample.

    `reward`: the run's reward settings (`RewardConfig` as a dict); `pixels`: its `look.pixels`.
    """
    return [_picture(list(group), reward, pixels) for _, group in groupby(rows, key=lambda row: row["sample_id"])]


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
    weighted, of_ranked = weights(reward["components"]), weights(reward["ranked"])
    ranked = {} if reward["rank"] == "none" else of_ranked
    plain = weighted | (of_ranked if reward["rank"] == "none" else {})
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


def _picture(rows: list[Row], reward: Mapping[str, Any], pixels: int) -> Picture:
    head = rows[0]
    height, width = head["height"], head["width"]
    image = decoded(head["image"]["bytes"])
    attempts = [_attempt(row, reward, image, pixels) for row in rows]
    attempts.sort(key=lambda attempt: -(attempt.reward or 0.0))
    return Picture(
        step=head["step"],
        sample_id=head["sample_id"],
        task=head["task"],
        question=printable(head["question"]),
        image=data_uri(image) if image is not None else None,
        height=height,
        width=width,
        truth_boxes=corner_and_size(head["truth_boxes"]),
        truth_masks=tuple(outline(mask_of(counts, height, width)) for counts in head["truth_masks"]),
        truth_count=len(head["truth_boxes"]),
        attempts=tuple(attempts),
    )


def _attempt(row: Row, reward: Mapping[str, Any], image: np.ndarray | None, pixels: int) -> Attempt:
    return Attempt(
        index=row["index"],
        **_answered(row, row, "\n⟶ next turn\n".join(row["turns"])),
        tokens=row["response_tokens"],
        reward=row["reward"],
        advantage=row["advantage"],
        parts=breakdown(row, reward),
        failure=row["failure"],
        failure_detail=printable(row["failure_detail"]) if row["failure_detail"] else None,
        iou=next((row["metrics"][name] for name in ("mask_iou", "box_iou") if name in row["metrics"]), None),
        passes=_passes(row, image, pixels) if len(row["passes"]) > 1 else (),
    )


def _passes(row: Row, image: np.ndarray | None, pixels: int) -> tuple[Pass, ...]:
    """Every look of a trajectory; each later one is cut from the image with the mask of the one before outlined."""
    found, before = [], None
    for one in row["passes"]:
        found.append(
            Pass(
                **_answered(row, one, one["text"]),
                confidence=one["confidence"],
                iou=one["mask_iou"],
                kept=one["kept"],
                view=corner_and_size([one["view"]])[0] if one["view"] else None,
                crop=_crop(row, one["view"], before, image, pixels) if one["view"] and image is not None else None,
            )
        )
        before = one["mask"]
    return tuple(found)


def _crop(row: Row, view: Sequence[int], before: str | None, image: np.ndarray, pixels: int) -> str:
    left, top, right, bottom = view
    provisional = mask_of(before, row["height"], row["width"]) if before else None
    return data_uri(views.picture(image, (left, top, right, bottom), provisional, pixels))


def _answered(row: Row, one: Row, text: str) -> dict[str, Any]:
    """What a trajectory or one of its passes said and drew; `row` has the image's size."""
    return {
        "text": printable(text),
        "boxes": corner_and_size(one["boxes"]),
        "points": tuple((x, y) for x, y in one["points"]),
        "mask": outline(mask_of(one["mask"], row["height"], row["width"])) if one["mask"] else "",
    }
