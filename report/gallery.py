"""Rollouts as pictures: rows of the rollout table, made drawable for the template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import numpy as np

from perception import views
from perception.config import weights
from report.drawing import corner_and_size, data_uri, decoded, mask_of, outline

MAX_TEXT = 4000

Row = Mapping[str, Any]
"""A row of the rollout table: the columns of `rollouts.SCHEMA`."""
Picture = SimpleNamespace
"""One question about one image: the columns that a group's rows share, made drawable, and what was answered.

    question       printable
    image          data: URI; None where the bytes do not decode
    truth_boxes    (x, y, width, height) each, original pixels
    truth_text     printable; empty where nothing is to be read
    truth_masks    SVG paths
    attempts       one per row, best reward first
"""
Attempt = SimpleNamespace
"""A row, or one of its passes, made drawable.

    text, failure_detail    printable
    boxes                   (x, y, width, height) each, original pixels
    labels                  of the boxes, printable
    points, background      [x, y] each, on the objects and beside them
    mask                    SVG path, empty where nothing was segmented
    iou                     of the masks, or of the boxes where no masks were compared; None: not measured
    parts                   of a row: how its reward came about
    passes                  of a row: one per look where there was more than one, else empty
    view                    of a pass: (x, y, width, height) of what was shown enlarged; None: the whole image
    crop                    of a pass: data: URI of the view as the policy was shown it; None: no view, or no image
"""


@dataclass(frozen=True, slots=True)
class Part:
    """One line of a reward's breakdown."""

    name: str
    raw: float | None = None
    weight: float | None = None
    points: float | None = None
    """Its share of the reward; None for what is only measured."""


def pictures(rows: Sequence[Row], reward: Mapping[str, Any], pixels: int) -> list[Picture]:
    """Group consecutive rows of one sample.

    `reward`: the run's reward settings (`RewardConfig` as a dict); `pixels`: its `look.pixels`.
    """
    return [_picture(list(group), reward, pixels) for _, group in groupby(rows, key=lambda row: row["sample_id"])]


def printable(text: str) -> str:
    """The text with control and direction-changing characters spelled out, cut at MAX_TEXT."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else f"\\u{ord(c):04x}" for c in text[:MAX_TEXT])
    return shown + (f"\n… {len(text) - MAX_TEXT:,} more characters" if len(text) > MAX_TEXT else "")


def breakdown(row: Row, reward: Mapping[str, Any]) -> list[Part]:
    """Parts of the reward: weight x raw value per component; ranks are only known as their sum.

    What the components do not explain (ranks, the rule for failed answers) is a line of its own, so that the points
    always add up to the reward. Measured but unrewarded metrics follow without points.
    """
    metrics, by_rank = row["metrics"], reward["rank"] != "none"
    components, ranked = weights(reward["components"]), weights(reward["ranked"])
    plain = components if by_rank else components | ranked
    parts = [Part(n, metrics.get(n), w, w * metrics[n] if n in metrics else None) for n, w in plain.items()]
    parts += [Part(name, metrics.get(name), weight) for name, weight in ranked.items() if by_rank]
    if row["reward"] is None:
        parts = [replace(part, weight=None, points=None) for part in parts]
    else:
        rest = row["reward"] - sum(part.points or 0.0 for part in parts)
        if (by_rank and ranked) or abs(rest) > 1e-6:
            parts.append(Part("rule for failed answers" if row["failure"] else "by rank", points=rest))
    others = metrics.keys() - components.keys() - ranked.keys()
    return parts + [Part(name, metrics[name]) for name in sorted(others)]


def _picture(rows: list[Row], reward: Mapping[str, Any], pixels: int) -> Picture:
    head = rows[0]
    image = decoded(head["picture"], head["height"], head["width"])
    attempts = [_attempt(row, reward, image, pixels) for row in rows]
    return Picture(
        **{name: head[name] for name in ("step", "sample_id", "task", "height", "width")},
        question=printable(head["question"]),
        truth_text=printable("".join(head["truth_texts"])),
        image=data_uri(image) if image is not None else None,
        truth_boxes=corner_and_size(head["truth_boxes"]),
        truth_masks=[outline(mask_of(counts, head["height"], head["width"])) for counts in head["truth_masks"]],
        attempts=sorted(attempts, key=lambda attempt: -(attempt.reward or 0.0)),
    )


def _attempt(row: Row, reward: Mapping[str, Any], image: np.ndarray | None, pixels: int) -> Attempt:
    metrics = row["metrics"]
    drawn = _drawn(row, row) | {
        "text": printable("\n⟶ next turn\n".join(row["turns"])),
        "failure_detail": printable(row["failure_detail"] or ""),
        "iou": metrics.get("mask_iou", metrics.get("box_iou")),
        "parts": breakdown(row, reward),
        "passes": _passes(row, image, pixels) if len(row["passes"]) > 1 else [],
    }
    return Attempt(**{**row, **drawn})


def _passes(row: Row, image: np.ndarray | None, pixels: int) -> list[Attempt]:
    """Every look of a trajectory; each later one is cut from the image with the mask of the one before outlined."""
    found, provisional = [], None
    for one in row["passes"]:
        view, crop = one["view"], None
        if view and image is not None:
            crop = data_uri(views.picture(image, tuple(view), provisional, pixels))
        drawn = {"iou": one["mask_iou"], "view": corner_and_size([view])[0] if view else None, "crop": crop}
        found.append(Attempt(**{**one, **_drawn(row, one), **drawn}))
        provisional = mask_of(one["mask"], row["height"], row["width"]) if one["mask"] else None
    return found


def _drawn(row: Row, one: Row) -> dict[str, Any]:
    """What a trajectory or one of its passes wrote and drew; `row` has the image's size."""
    return {
        "text": printable(one["text"]),
        "boxes": corner_and_size(one["boxes"]),
        "labels": [printable(label) for label in one["labels"]],
        "mask": outline(mask_of(one["mask"], row["height"], row["width"])) if one["mask"] else "",
    }
