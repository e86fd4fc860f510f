"""Reward components: documented pure functions of one answer and its truth, registered by name.

    @component(needs={"masks"})
    def s_measure(case: Case, *, alpha: float = 0.5) -> float: ...

In the settings a component has a weight, or a weight and parameters that are checked against its signature:

    reward.components: {mask_iou: 0.7, s_measure: {weight: 0.3, alpha: 0.5}}

Values lie in 0..1 unless a component says otherwise. Held-out metrics are components, too, with default parameters.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np

from perception.config import RewardConfig, Weights
from perception.errors import UserError
from perception.frames import Frame
from perception.matching import Matched, match, objects_of_answer, objects_of_target
from perception.registry import Registry, check_arguments, import_all, nearest
from perception.types import Answer, Target, Truth, View

V = TypeVar("V")
F = TypeVar("F", bound=Callable[..., float])


@dataclass(frozen=True)
class Case:
    """One completion beside its truth."""

    text: str
    answer: Answer
    """In original pixels."""
    target: Target
    image: Frame
    """The original image: the frame of `answer` and `target`."""
    view: View
    """The part of the image that `text` is about, and the frame of the numbers in it."""
    mask_iou: float = 0.0
    """IoU of the unions of the answered and of the true masks, at the original size; 1 where nothing is there and the
    answer says so."""
    mask_dice: float = 0.0
    masks: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None
    """Makes the answered and the true mask, (H, W) bool at the original size, where masks are compared."""
    _computed: dict[Callable[["Case"], Any], Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def answered(self) -> bool:
        return self.answer.failure is None

    def once(self, compute: Callable[["Case"], V]) -> V:
        """`compute(self)`, computed once for all components that ask for it."""
        if compute not in self._computed:
            self._computed[compute] = compute(self)
        found: V = self._computed[compute]
        return found

    @cached_property
    def matched(self) -> Matched:
        """Answered and true objects in pairs, by the continuous cost."""
        truth = objects_of_target(self.target, self.image)
        return match(objects_of_answer(self.answer, self.image), truth, "continuous")


@dataclass(frozen=True, slots=True)
class Component:
    """A registered component; as a term of a reward, with the parameters that the settings give it."""

    measure: Callable[..., float]
    needs: frozenset[Truth]
    """Parts of the truth without which it cannot be measured. With masks it also needs the segmenter."""

    def __call__(self, case: Case) -> float:
        return float(self.measure(case))


COMPONENTS: Registry[Component] = Registry("reward component")


def component(*, needs: Iterable[Truth] = ()) -> Callable[[F], F]:
    """Decorator: register a function `(case, *, parameters) -> value` under its own name."""

    def add(measure: F) -> F:
        COMPONENTS.register(measure.__name__)(Component(measure, frozenset(needs)))
        return measure

    return add


def terms(chosen: Weights, where: str) -> dict[str, Component]:
    """The terms of `reward.components` or `reward.ranked` that have a weight, by name. Raises UserError, beginning with
    `where`."""
    found: dict[str, Component] = {}
    for name, given in chosen.items():
        if name not in COMPONENTS:
            raise UserError(f"{where}: no component '{name}'; {nearest(name, COMPONENTS)}")
        parameters = dict(given) if isinstance(given, dict) else {"weight": given}
        weight = parameters.pop("weight", None)
        if not isinstance(weight, int | float):
            raise UserError(f"{where}.{name}: needs a weight, as {name}: 1.0 or {name}: {{weight: 1.0, ...}}")
        one = COMPONENTS[name]
        arguments = check_arguments(one.measure, parameters, f"{where}.{name}")
        found |= {name: replace(one, measure=partial(one.measure, **arguments))} if weight else {}
    return found


def reward_terms(reward: RewardConfig) -> dict[str, Component]:
    """Every component that a reward measures, by name. Raises UserError for one that does not fit."""
    plain, ranked = terms(reward.components, "reward.components"), terms(reward.ranked, "reward.ranked")
    if twice := plain.keys() & ranked.keys():
        raise UserError(f"reward.components and reward.ranked both name {min(twice)}; name it in one of them")
    return plain | ranked


def held_out_terms(metrics: Iterable[str]) -> dict[str, Component]:
    """A task's held-out metrics, with their default parameters. Raises UserError for an unknown name."""
    return {name: COMPONENTS[name] for name in metrics}


def needs(used: Mapping[str, Component]) -> frozenset[Truth]:
    """The parts of the truth that they need together."""
    return frozenset().union(*(one.needs for one in used.values()))


def needed_truth(reward: RewardConfig) -> frozenset[Truth]:
    """The parts of the truth that a reward needs of its training samples."""
    ranked: frozenset[Truth] = frozenset({"masks"}) if reward.rank == "group" else frozenset()
    return needs(reward_terms(reward)) | ranked


import_all(__name__)
