"""Guards the bucket format: aligned, complete, no larger than asked, and bit for bit what went in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.sync import ALIGNMENT, pack, plan_buckets, view

DTYPES = (torch.float32, torch.bfloat16, torch.int64)
SHAPES = st.lists(
    st.tuples(st.lists(st.integers(0, 9), max_size=3).map(tuple), st.sampled_from(DTYPES)), min_size=1, max_size=30
)


def tensors(shapes: list[tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
    return {f"p{i}": (torch.randn(shape) * 100).to(dtype) for i, (shape, dtype) in enumerate(shapes)}


@given(SHAPES, st.integers(1, 4000))
def test_every_parameter_comes_back_exactly(shapes: list[tuple[tuple[int, ...], torch.dtype]], limit: int) -> None:
    parameters = tensors(shapes)
    plans = plan_buckets({name: (tuple(p.shape), p.dtype) for name, p in parameters.items()}, limit)
    buffer = torch.full((max(plan.nbytes for plan in plans),), 255, dtype=torch.uint8)
    received: dict[str, Tensor] = {}
    for plan in plans:
        flat = pack(plan, parameters, buffer).clone()
        assert flat.shape == (plan.nbytes,)
        assert plan.nbytes <= limit or len(plan.slots) == 1
        for slot in plan.slots:
            assert slot.offset % ALIGNMENT == 0
            received[slot.name] = view(flat, slot)
    assert list(received) == list(parameters)
    for name, parameter in parameters.items():
        assert received[name].dtype == parameter.dtype
        assert torch.equal(received[name], parameter)


def test_layout_by_hand() -> None:
    shapes = {"a": ((3,), torch.float32), "b": ((2, 2), torch.bfloat16), "c": ((100,), torch.float32)}
    first, second = plan_buckets(shapes, limit=64)
    assert [(s.name, s.dtype, s.shape, s.offset) for s in first.slots] == [
        ("a", "float32", (3,), 0),
        ("b", "bfloat16", (2, 2), 16),
    ]
    assert first.nbytes == 24
    assert (second.slots[0].name, second.nbytes) == ("c", 400)


def test_a_wrong_shape_is_not_packed_in_silence() -> None:
    (plan,) = plan_buckets({"a": ((3,), torch.float32)}, limit=64)
    with pytest.raises(RuntimeError, match="size"):
        pack(plan, {"a": torch.zeros(4)}, torch.zeros(64, dtype=torch.uint8))
