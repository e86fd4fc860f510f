"""The synthetic world: masks are exact, boxes and points fit them, questions single out what they name."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthetic.scenes import Question, Scene, SceneStyle, ask, generate

CROWDED = SceneStyle(min_objects=3, max_objects=5, relation=0.3, several=0.25, counting=0.15, no_target=0.15)


@given(st.integers(0, 10**9))
@settings(max_examples=60)
def test_boxes_bound_their_masks_and_points_lie_inside(seed: int) -> None:
    scene = generate(seed, CROWDED)
    assert scene.objects
    for item in scene.objects:
        rows, columns = np.nonzero(item.mask)
        assert item.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert item.mask[item.point[1], item.point[0]]


@given(st.integers(0, 10**9))
@settings(max_examples=30)
def test_masks_are_disjoint_and_a_seed_draws_the_same_bytes(seed: int) -> None:
    scene, again = generate(seed, CROWDED), generate(seed, CROWDED)
    assert np.sum([item.mask for item in scene.objects], axis=0).max() == 1
    assert np.array_equal(scene.image, again.image)


def test_an_object_differs_from_its_background_even_when_camouflaged() -> None:
    style = SceneStyle(min_objects=1, max_objects=1, camouflage=1.0, digit=0.0)
    gaps = []
    for seed in range(20):
        scene = generate(seed, style)
        mask = scene.objects[0].mask
        gaps.append(np.abs(scene.image[mask].mean(0) - scene.image[~mask].mean(0)).max())
    assert min(gaps) > 3 and np.mean(gaps) < 60


@cache
def asked(seed: int) -> tuple[Scene, Question]:
    scene = generate(seed, CROWDED)
    return scene, ask(scene, np.random.default_rng(seed), CROWDED)


def _words(text: str) -> set[str]:
    return {word.rstrip("s") for word in text.split()}


@pytest.mark.parametrize("kind", ["attribute", "relation", "several", "count", "none"])
def test_every_kind_of_question_is_asked_and_true(kind: str) -> None:
    found = 0
    for seed in range(400):
        scene, question = asked(seed)
        if question.kind != kind:
            continue
        found += 1
        words = _words(
            question.text.split(" left of ")[0].split(" right of ")[0].split(" above ")[0].split(" below ")[0]
        )
        named = {"red", "green", "blue", "yellow", "purple", "orange", "white", "black"} & words
        for index in question.targets:
            target = scene.objects[index]
            assert not named or target.attributes["colour"] in named
        if kind == "none":
            assert question.targets == ()
            colour, shape = question.text.split()[1:3]
            assert not any({"colour": colour, "shape": shape}.items() <= o.attributes.items() for o in scene.objects)
        elif kind == "several":
            assert len(question.targets) > 1
        elif kind in ("attribute", "relation"):
            assert len(question.targets) == 1
        if kind == "relation":
            _check_relation(scene, question)
    assert found >= 10


def _check_relation(scene: Scene, question: Question) -> None:
    """The target lies on the named side of an object that the anchor's words fit."""
    relation = next(r for r in ("left of", "right of", "above", "below") if f" {r} " in question.text)
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
    target = scene.objects[question.targets[0]]
    others = [o for i, o in enumerate(scene.objects) if i != question.targets[0]]
    assert any((target.point[axis] - other.point[axis]) * sign > 0 for other in others)


def test_what_is_counted_is_what_matches() -> None:
    """'how many circles' targets exactly the circles."""
    checked = 0
    for seed in range(300):
        scene, question = asked(seed)
        if question.kind == "count" and question.text == "how many circles":
            checked += 1
            assert set(question.targets) == {
                i for i, o in enumerate(scene.objects) if o.attributes["shape"] == "circle"
            }
    assert checked >= 3
