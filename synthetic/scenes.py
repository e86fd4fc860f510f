"""The synthetic world: procedurally drawn scenes with exact masks, and questions about them.

    scene = generate(seed=7)     # objects with shape, colour, size, texture, digit, camouflage, occlusion
    question = ask(scene, np.random.default_rng(7))     # "the large red circle", "how many squares", ...

Everything is drawn into one label map, so a mask is exactly the visible part of its object. All coordinates are
pixels of the scene; everything is a pure function of the seed and the style.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

import cv2
import numpy as np

from perception.masks import extent
from perception.types import Rect

COLOURS = {
    "red": (214, 48, 49),
    "green": (38, 166, 91),
    "blue": (41, 98, 220),
    "yellow": (241, 196, 15),
    "purple": (142, 68, 173),
    "orange": (230, 126, 34),
    "white": (240, 240, 240),
    "black": (30, 30, 34),
}
HIDDEN = "hidden"
"""The colour of a camouflaged object: almost the background's own."""
TEXTURES = {
    "striped": lambda row, column, period: (row + column) % period < period // 2,
    "dotted": lambda row, column, period: (row % period < period // 2) & (column % period < period // 2),
}
"""Which pixels are dark, by row and column; `period` in pixels."""
Attributes = dict[str, str]
"""Words for an object by kind, in this order: size, texture, colour, shape, digit; without the kinds that it lacks.

    {"size": "large", "texture": "striped", "colour": "red", "shape": "circle", "digit": "7"}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneStyle:
    """What may appear, and how often. Probabilities are per object or per question."""

    side: int = 112
    min_objects: int = 1
    max_objects: int = 4
    min_size: float = 0.11
    """Smallest object radius as a share of the side; 'small' and 'large' split the range in the middle."""
    max_size: float = 0.24
    texture: float = 0.3
    digit: float = 0.15
    camouflage: float = 0.05
    overlap: float = 0.25
    """Largest share of an older object that a newer one may cover."""
    relation: float = 0.12
    several: float = 0.12
    counting: float = 0.05
    no_target: float = 0.04


WORLD = SceneStyle(side=224, max_objects=3, min_size=0.08, camouflage=0.12)
"""The demo's scenes. The mini policy sees them at half their side: a crop shows what the whole image cannot."""
SHIFTED = SceneStyle(
    side=224, min_objects=3, max_objects=5, min_size=0.07, max_size=0.2, camouflage=0.2, texture=0.5, relation=0.3
)
"""Out of the demo's domain: more objects, smaller and better hidden, more relations to follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneObject:
    attributes: Attributes
    mask: np.ndarray
    """(side, side) bool: the visible part."""
    box: Rect
    """x1 y1 x2 y2 around the visible part; x2 and y2 are exclusive (COCO's x + w)."""
    point: tuple[int, int]
    """x y: the visible pixel farthest from the object's edge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    image: np.ndarray
    """(side, side, 3) uint8 RGB."""
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    text: str
    task: Literal["segment", "count"]
    kind: Literal["attribute", "relation", "several", "count", "none"]
    targets: tuple[int, ...]
    """Indices into `Scene.objects`, left to right."""


def _polygon(angles: Sequence[float] | np.ndarray, radii: Sequence[float] = (1.0,)) -> np.ndarray:
    a = np.deg2rad(np.asarray(angles, float))
    r = np.resize(np.asarray(radii, float), a.shape)
    return np.stack([r * np.cos(a), r * np.sin(a)], axis=1)


_ARM = 0.36
SHAPES: dict[str, np.ndarray] = {
    "circle": _polygon(np.arange(0, 360, 10)),
    "square": _polygon([45, 135, 225, 315], [1.2]),
    "triangle": _polygon([30, 150, 270], [1.2]),
    "star": _polygon(np.arange(-90, 270, 36), [1.15, 0.5]),
    "cross": np.array(
        [[_ARM, -1], [_ARM, -_ARM], [1, -_ARM], [1, _ARM], [_ARM, _ARM], [_ARM, 1],
         [-_ARM, 1], [-_ARM, _ARM], [-1, _ARM], [-1, -_ARM], [-_ARM, -_ARM], [-_ARM, -1]]
    ),
    "bar": np.array([[-1.25, -0.5], [1.25, -0.5], [1.25, 0.5], [-1.25, 0.5]]),
}  # fmt: skip


def generate(seed: int, style: SceneStyle = SceneStyle()) -> Scene:
    """Draw one scene. The same seed and style give the same bytes."""
    rng = np.random.default_rng(seed)
    image = _background(rng, style.side)
    labels = np.zeros((style.side, style.side), np.uint8)
    wanted = int(rng.integers(style.min_objects, style.max_objects + 1))
    placed: list[_Planned] = []
    for _ in range(wanted * 4):
        if len(placed) == wanted:
            break
        planned = _plan(rng, style)
        if _place(labels, planned, len(placed) + 1, style.overlap):
            placed.append(planned)
    objects = []
    for label, planned in enumerate(placed, start=1):
        mask = labels == label
        _paint(rng, image, mask, planned)
        box, point = extent(mask)
        objects.append(SceneObject(attributes=planned.attributes, mask=mask, box=box, point=point))
    return Scene(image=image, objects=tuple(objects))


def stream(seed: int, style: SceneStyle = SceneStyle()) -> Iterator[Scene]:
    """Scenes `seed`, `seed + 1`, ... without end."""
    return (generate(i, style) for i in count(seed))


def ask(scene: Scene, rng: np.random.Generator, style: SceneStyle = SceneStyle()) -> Question:
    """One question about the scene, of a kind drawn by the style; falls back to a single-object question."""
    draw = rng.random()
    for share, maker in (
        (style.relation, _ask_relation),
        (style.several, _ask_several),
        (style.counting, _ask_count),
        (style.no_target, _ask_none),
    ):
        if draw < share:
            return maker(scene, rng) or _ask_attribute(scene, rng)
        draw -= share
    return _ask_attribute(scene, rng)


# ---------------------------------------------------------------- drawing


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    attributes: Attributes
    radius: float
    centre: np.ndarray
    """(2,) x y."""
    polygon: np.ndarray
    """(corners, 2) int32."""


def _background(rng: np.random.Generator, side: int) -> np.ndarray:
    """Grey with a faint light from one corner: it rises to the right in red and downwards in blue."""
    ramp = np.linspace(-28, 28, side, dtype=np.float32)
    base = rng.integers(112, 144)
    noise = rng.integers(-5, 6, (side // 4 + 1, side // 4 + 1), dtype=np.int8).repeat(4, 0).repeat(4, 1)[:side, :side]
    image = np.empty((side, side, 3), np.float32)
    image[..., 0] = base + ramp[None, :] + noise
    image[..., 1] = base + noise
    image[..., 2] = base + ramp[:, None] + noise
    return image.astype(np.uint8)


def _plan(rng: np.random.Generator, style: SceneStyle) -> _Planned:
    shape = str(rng.choice(list(SHAPES)))
    middle = (style.min_size + style.max_size) / 2
    large = bool(rng.random() < 0.5)
    low, high = (middle * 1.08, style.max_size) if large else (style.min_size, middle * 0.92)
    radius = float(rng.uniform(low, high)) * style.side
    turn = np.deg2rad(rng.uniform(-12, 12))
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    outline = SHAPES[shape] @ rotation.T * radius
    reach = np.abs(outline).max(0) + 1
    centre = rng.uniform(reach, np.maximum(style.side - reach, reach + 1e-3))
    hidden = rng.random() < style.camouflage
    colour = str(rng.choice(list(COLOURS)))
    texture = str(rng.choice(list(TEXTURES))) if hidden or rng.random() < style.texture else ""
    digit = str(rng.integers(0, 10)) if rng.random() < style.digit and shape in ("circle", "square") else ""
    known = {
        "size": "large" if large else "small",
        "texture": texture,
        "colour": HIDDEN if hidden else colour,
        "shape": shape,
        "digit": digit,
    }
    return _Planned(
        attributes={key: value for key, value in known.items() if value},
        radius=radius,
        centre=centre,
        polygon=np.rint(outline + centre).astype(np.int32),
    )


def _place(labels: np.ndarray, planned: _Planned, label: int, overlap: float) -> bool:
    """Draw the object into the label map, unless it hides too much of an older one."""
    before = np.bincount(labels.ravel(), minlength=label + 1)
    trial = cv2.fillPoly(labels.copy(), [planned.polygon], label)
    after = np.bincount(trial.ravel(), minlength=label + 1)
    older = slice(1, label)
    if (after[older] < (1 - overlap) * before[older]).any():
        return False
    labels[...] = trial
    return True


def _paint(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray, planned: _Planned) -> None:
    """Colour, texture and digit, where the object is visible. There the image still shows the background."""
    known, side = planned.attributes, len(image)
    hidden = known["colour"] == HIDDEN
    if hidden:
        colour = image[mask].mean(0) + rng.choice([-14, 14])
    else:
        colour = np.array(COLOURS[known["colour"]]) + rng.integers(-8, 9, 3)
    image[mask] = np.clip(colour, 0, 255)
    if "texture" in known:
        row, column = np.ogrid[:side, :side]
        marks = mask & TEXTURES[known["texture"]](row, column, max(4, side // 20))
        image[marks] = (image[marks].astype(np.int16) * (0.8 if hidden else 0.55)).astype(np.uint8)
    if "digit" in known:
        _write_digit(image, mask, planned)


def _write_digit(image: np.ndarray, mask: np.ndarray, planned: _Planned) -> None:
    digit, font = planned.attributes["digit"], cv2.FONT_HERSHEY_SIMPLEX
    scale, thickness = planned.radius / 16, max(1, round(planned.radius / 9))
    (width, height), _ = cv2.getTextSize(digit, font, scale, thickness)
    x, y = planned.centre
    origin = (round(x - width / 2), round(y + height / 2))
    glyph = cv2.putText(np.zeros(mask.shape, np.uint8), digit, origin, font, scale, 1, thickness)
    image[(glyph > 0) & mask] = 20 if image[mask].mean() > 110 else 245


# ---------------------------------------------------------------- questions


def _phrase(attributes: Attributes, plural: bool = False) -> str:
    noun = attributes.get("shape", "object")
    if plural:
        noun += "es" if noun.endswith("s") else "s"
    words = [attributes[key] for key in ("size", "texture", "colour") if key in attributes] + [noun]
    if "digit" in attributes:
        words.append(f"with the digit {attributes['digit']}")
    return " ".join(words)


def _matching(scene: Scene, attributes: Attributes) -> tuple[int, ...]:
    """Objects with all these attributes, left to right."""
    hits = [i for i, one in enumerate(scene.objects) if attributes.items() <= one.attributes.items()]
    return tuple(sorted(hits, key=lambda i: (scene.objects[i].box[0], i)))


def _some_attributes(rng: np.random.Generator, target: SceneObject, least: int, most: int) -> Attributes:
    known = list(target.attributes.items())
    take = min(len(known), int(rng.integers(least, most + 1)))
    return dict(known[i] for i in sorted(rng.choice(len(known), take, replace=False)))


def _describe(scene: Scene, rng: np.random.Generator, index: int) -> Attributes | None:
    """Attributes that single the object out; short ones are tried first."""
    for attempt in range(8):
        attributes = _some_attributes(rng, scene.objects[index], 1 + attempt // 3, 2 + attempt // 3)
        if _matching(scene, attributes) == (index,):
            return attributes
    return None


def _ask_attribute(scene: Scene, rng: np.random.Generator) -> Question:
    """'the large red circle'; where nothing can be singled out, a question of number."""
    for index in map(int, rng.permutation(len(scene.objects))):
        attributes = _describe(scene, rng, index)
        if attributes is not None:
            return Question(text=f"the {_phrase(attributes)}", task="segment", kind="attribute", targets=(index,))
    return _ask_count(scene, rng)


def _ask_relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    """'the square left of the red circle': unique among the shapes of that noun."""
    if len(scene.objects) < 2:
        return None
    anchor, target = (int(i) for i in rng.permutation(len(scene.objects))[:2])
    anchor_words = _describe(scene, rng, anchor)
    if anchor_words is None:
        return None
    gaps = np.subtract([one.point for one in scene.objects], scene.objects[anchor].point)
    axis = int(abs(gaps[target, 1]) > abs(gaps[target, 0]))
    relation = (("left of", "right of"), ("above", "below"))[axis][int(gaps[target, axis] > 0)]
    noun = _some_attributes(rng, scene.objects[target], 1, 1)
    rivals = [i for i in _matching(scene, noun) if gaps[i, axis] * gaps[target, axis] > 0]
    if rivals != [target]:
        return None
    text = f"the {_phrase(noun)} {relation} the {_phrase(anchor_words)}"
    return Question(text=text, task="segment", kind="relation", targets=(target,))


def _ask_several(scene: Scene, rng: np.random.Generator) -> Question | None:
    for index in rng.permutation(len(scene.objects)):
        attributes = _some_attributes(rng, scene.objects[index], 1, 2)
        targets = _matching(scene, attributes)
        if len(targets) > 1:
            return Question(text=f"all {_phrase(attributes, True)}", task="segment", kind="several", targets=targets)
    return None


def _ask_count(scene: Scene, rng: np.random.Generator) -> Question:
    index = int(rng.integers(len(scene.objects)))
    attributes = _some_attributes(rng, scene.objects[index], 1, 1)
    text = f"how many {_phrase(attributes, True)}"
    return Question(text=text, task="count", kind="count", targets=_matching(scene, attributes))


def _ask_none(scene: Scene, rng: np.random.Generator) -> Question | None:
    for _ in range(8):
        attributes = {"colour": str(rng.choice(list(COLOURS))), "shape": str(rng.choice(list(SHAPES)))}
        if not _matching(scene, attributes):
            return Question(text=f"the {_phrase(attributes)}", task="segment", kind="none", targets=())
    return None
