"""Guards the weight wire: buckets aligned, complete, no larger than asked, bit for bit what went in; the checksum; both
ends of each transport that a CPU has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from perception.weights import WeightBucket
from runtime.weights import (
    ALIGNMENT,
    Broadcast,
    Inbox,
    checksum,
    fill,
    open_store,
    plan_buckets,
    shard_sum,
    shared_file,
    total,
    view,
)

DTYPES = (torch.float32, torch.bfloat16, torch.int64)
SHAPES = st.lists(
    st.tuples(st.lists(st.integers(0, 9), max_size=3).map(tuple), st.sampled_from(DTYPES)), min_size=1, max_size=30
)


def tensors(shapes: list[tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
    return {f"p{i}": (torch.randn(shape) * 100).to(dtype) for i, (shape, dtype) in enumerate(shapes)}


@given(SHAPES, st.integers(1, 4000))
def test_every_parameter_comes_back_exactly(shapes: list[tuple[tuple[int, ...], torch.dtype]], limit: int) -> None:
    parameters = tensors(shapes)
    plans = plan_buckets({name: (tuple(p.shape), p.dtype) for name, p in parameters.items()}, limit, "store")
    buffer = torch.full((max(plan.nbytes for plan in plans),), 255, dtype=torch.uint8)
    received: dict[str, Tensor] = {}
    for plan in plans:
        flat = fill(plan, parameters, buffer).clone()
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
    first, second = plan_buckets(shapes, 64, "store")
    assert [(s.name, s.dtype, s.shape, s.offset) for s in first.slots] == [
        ("a", "float32", (3,), 0),
        ("b", "bfloat16", (2, 2), 16),
    ]
    assert first.nbytes == 24
    assert (second.slots[0].name, second.nbytes) == ("c", 400)


def test_a_wrong_shape_is_not_filled_in_silence() -> None:
    (plan,) = plan_buckets({"a": ((3,), torch.float32)}, 64, "store")
    with pytest.raises(RuntimeError, match="size"):
        fill(plan, {"a": torch.zeros(4)}, torch.zeros(64, dtype=torch.uint8))


def test_the_checksum_survives_stacking_and_padding_by_rows() -> None:
    query, key = torch.randn(8, 5), torch.randn(4, 5)
    bias = torch.randn(8), torch.randn(4)
    apart = checksum({"l.3.q": query, "l.3.k": key, "l.3.q.bias": bias[0], "l.3.k.bias": bias[1]}.items())
    stacked = torch.cat([query, key, torch.zeros(2, 5)])
    assert checksum({"model.l.3.qkv": stacked, "model.l.3.qkv.bias": torch.cat(bias)}.items()) == apart


def test_the_checksum_tells_elements_columns_layers_and_every_bit_apart() -> None:
    weight = torch.randn(6, 7).to(torch.bfloat16)
    sums = {checksum([("layers.0.w", weight)]), checksum([("layers.1.w", weight)])}
    sums.add(checksum([("layers.0.w", weight.flip(1))]))
    for row, column in ((0, 0), (5, 6)):
        for bit in range(15):
            bits = weight.clone().view(torch.int16)
            bits[row, column] ^= 1 << bit
            sums.add(checksum([("layers.0.w", bits.view(torch.bfloat16))]))
    # Flips of one bit up and the same bit down in another row and column must not meet either.
    assert len(sums) == 3 + 2 * 15


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.data())
def test_the_shards_of_all_workers_add_up_to_the_checksum_and_no_copy_may_differ(
    workers: int, height: int, copies: int, data: st.DataObject
) -> None:
    """A grid of shards by rows or by columns, each of them held by as many workers as there are copies."""
    whole = torch.randn(height * workers, 2 * workers)
    by_columns = data.draw(st.booleans())
    shards = [shard.clone() for shard in whole.chunk(workers, dim=int(by_columns)) for _ in range(copies)]

    def added() -> int:
        places = [(2 * (i // copies) if by_columns else 0, i % copies) for i in range(len(shards))]
        sums = zip(shards, places, strict=True)
        return total(
            shard_sum("l.1.w", shard, column=column, copy=copy, copies=copies) for shard, (column, copy) in sums
        )

    assert added() == checksum([("l.1.w", whole)])
    shards[data.draw(st.integers(0, len(shards) - 1))][-1, -1] += 1
    assert added() != checksum([("l.1.w", whole)])


def buckets(parameters: dict[str, Tensor], transport: str) -> Iterator[tuple[WeightBucket, Tensor]]:
    """Plan and flat bytes of each bucket of at most 100 bytes."""
    for plan in plan_buckets({name: (tuple(p.shape), p.dtype) for name, p in parameters.items()}, 100, transport):
        yield plan, fill(plan, parameters, torch.zeros(plan.nbytes, dtype=torch.uint8))


PARAMETERS = tensors([((3,), torch.float32), ((2, 2), torch.bfloat16), ((5, 7), torch.float32), ((), torch.int64)])


def assert_holds(inbox: Inbox, parameters: dict[str, Tensor]) -> None:
    received = dict(inbox.tensors())
    assert list(received) == list(parameters)
    assert all(torch.equal(received[name], parameters[name]) for name in parameters)
    assert checksum(received.items()) == checksum(parameters.items())


def test_buckets_arrive_through_files_which_may_then_go() -> None:
    inbox, files = Inbox(), []
    for plan, flat in buckets(PARAMETERS, "store"):
        with shared_file(flat.numpy()) as file:
            inbox.take("store", file.name, plan.nbytes, plan.slots)
            files.append(Path(file.name))
    assert len(files) == 3 and not any(file.exists() for file in files)
    assert inbox.all_arrived()
    assert_holds(inbox, PARAMETERS)
    inbox.clear()
    assert list(inbox.tensors()) == []


def test_buckets_arrive_by_broadcast_and_a_new_group_replaces_the_old() -> None:
    inboxes = [Inbox(), Inbox()]
    for scale in (1, 2):
        parameters = {name: parameter * scale for name, parameter in PARAMETERS.items()}
        store = open_store("127.0.0.1", 3, 20.0)
        sender = Broadcast(lambda store=store: store, 0, 3, 20.0, None)  # type: ignore[misc]
        for plan, flat in buckets(parameters, "gloo"):
            for receiver, inbox in enumerate(inboxes, start=1):
                inbox.take("gloo", ("127.0.0.1", store.port, 3, receiver, 20.0), plan.nbytes, plan.slots)
            assert not inbox.all_arrived()
            sender.send(flat)()
        for inbox in inboxes:
            assert_holds(inbox, parameters)
            assert inbox.all_arrived()
            inbox.clear()
        sender.close()
