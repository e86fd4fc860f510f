"""Bounds and choices that the settings share."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

Positive = Annotated[int, Gt(0)]
Natural = Annotated[int, Ge(0)]
Rate = Annotated[float, Gt(0.0)]
NonNegative = Annotated[float, Ge(0.0)]
Fraction = Annotated[float, Ge(0.0), Le(1.0)]
LookMode = Literal["none", "inline", "relook"]
AnswerFrame = Literal["resized", "thousand"]
