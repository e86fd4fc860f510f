"""Guards the file format of the learner's checkpoints: slices of any cut, read back in any other one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from learner import checkpoint

PARTS = ("master", "exp_avg", "exp_avg_sq")

Whole = dict[str, dict[str, Tensor]]
"""Parameter -> part -> flat values."""


class Rank:
    """A rank's slices of `whole`, as stages 1 and 2 cut it (what lies flat, evenly) or ZeRO-3 (every parameter)."""

    def __init__(self, whole: Whole, rank: int, ranks: int, flat: bool) -> None:
        self.whole, self.rank, self.ranks, self.flat = whole, rank, ranks, flat
        self.steps, self.refreshed = (0, 0), False

    def slices(self) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
        total, before = sum(len(one["master"]) for one in self.whole.values()), 0
        for name, parts in self.whole.items():
            size = len(parts["master"])
            share = -(-(total if self.flat else size) // self.ranks)
            start = share * self.rank - (before if self.flat else 0)
            low, high = max(0, start), min(size, start + share)
            before += size
            if low < high:
                yield name, low, {part: values[low:high] for part, values in parts.items()}

    def refresh(self) -> None:
        self.refreshed = True


def made(sizes: list[int], value: float | None = None) -> Whole:
    torch.manual_seed(len(sizes))
    return {
        f"layer.{i}": {part: torch.randn(n) if value is None else torch.full((n,), value) for part in PARTS}
        for i, n in enumerate(sizes)
    }


def save(whole: Whole, ranks: int, flat: bool, folder: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    sums: dict[str, str] = {}
    for rank in range(ranks):
        patch.setattr("learner.checkpoint.dist.get_rank", lambda rank=rank: rank)
        one: Any = Rank(whole, rank, ranks, flat)
        one.steps = (5, 7)
        torch.manual_seed(100 + rank)
        sums |= checkpoint.save(one, folder)
    return sums


def load(whole: Whole, ranks: int, flat: bool, folder: Path, patch: pytest.MonkeyPatch, **how: Any) -> list[Any]:
    """Into `whole`; the ranks, each with the first number that its generator draws afterwards."""
    found: list[Any] = []
    for rank in range(ranks):
        patch.setattr("learner.checkpoint.dist.get_rank", lambda rank=rank: rank)
        torch.manual_seed(200 + rank)
        found.append(Rank(whole, rank, ranks, flat))
        checkpoint.load(found[-1], folder, **how)
        found[-1].drawn = float(torch.rand(()))
    return found


def first_number(seed: int) -> float:
    torch.manual_seed(seed)
    return float(torch.rand(()))


def differing(one: Whole, other: Whole, parts: tuple[str, ...] = PARTS) -> list[tuple[str, str]]:
    return [(name, part) for name in one for part in parts if not torch.equal(one[name][part], other[name][part])]


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    ranks=st.integers(1, 5),
    others=st.integers(1, 5),
    flat=st.booleans(),
    flat_there=st.booleans(),
)
def test_slices_of_any_cut_are_read_in_any_other(
    sizes: list[int], ranks: int, others: int, flat: bool, flat_there: bool
) -> None:
    before, after = made(sizes), made(sizes, value=torch.nan)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as name:
        save(before, ranks, flat, Path(name), patch)
        readers = load(after, others, flat_there, Path(name), patch)
    assert differing(before, after) == []
    for rank, reader in enumerate(readers):
        assert reader.refreshed and tuple(reader.steps) == (5, 7)
        assert reader.drawn == first_number((100 if rank < ranks else 200) + rank)


def test_weights_alone_leave_the_optimizer_and_the_generators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = made([9, 4]), made([9, 4], value=0.5)
    save(before, 2, True, tmp_path, monkeypatch)
    (one, *_) = load(after, 3, False, tmp_path, monkeypatch, weights_only=True)
    assert differing(before, after, ("master",)) == []
    assert all((values[part] == 0.5).all() for values in after.values() for part in PARTS[1:])
    assert one.steps == (0, 0) and one.drawn == first_number(200)


def test_what_is_not_there_whole_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(made([9, 4]), 2, False, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"3 elements of layer\.1 are missing"):
        load(made([9, 7]), 1, False, tmp_path, monkeypatch)
    (tmp_path / "rank-0001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"4 elements of layer\.0 are missing"):
        load(made([9, 4]), 1, True, tmp_path, monkeypatch)


def test_the_files_are_plain_safetensors_that_others_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = save(whole := made([9, 4]), 2, False, tmp_path, monkeypatch)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(sums)
    for name, checksum in sums.items():
        assert sha256((tmp_path / name).read_bytes()).hexdigest() == checksum
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o644
    with safe_open(tmp_path / "rank-0001.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("exp_avg.layer.0"), whole["layer.0"]["exp_avg"][5:])
