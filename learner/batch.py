"""Groups of trajectories -> padded rows.

A row is [prompt | turn 1 | fed | turn 2 | ...] with image placeholders expanded, padded on the right. Padding needs no
mask: attention is causal, so no real token ever sees it. Only sampled tokens are trained on. An image that many rows
share is in the batch once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from learner.loss import TokenBatch
from perception.types import Group, ImageHandle, TrainGroup, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Pixels:
    """One image as the vision tower takes it."""

    values: Tensor
    """(patches, channels * temporal * patch * patch) float32."""
    grid: Tensor
    """(3,) int64: temporal, height, width in patches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What of the policy a row depends on."""

    image_token_id: int
    merge: int
    """An image token stands for merge x merge patches."""
    positions: Callable[[Tensor, Tensor], Tensor]
    """(ids (T,), grids (images, 3)) -> M-RoPE positions (3, T), starting at 0."""
    pixels: Callable[[ImageHandle], Pixels]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """B rows of T tokens over I distinct images; N sampled tokens, flat, row after row."""

    input_ids: Tensor
    """(B, T) int64."""
    position_ids: Tensor
    """(3, B, T) int64."""
    pixel_values: Tensor
    """(patches of all I images, dim) float32."""
    image_grid: Tensor
    """(I, 3) int64."""
    image_slots: Tensor
    """(K,) flat positions in (B, T) that hold an image token ..."""
    image_source: Tensor
    """(K,) ... and the row of the image features that each one takes."""
    predictors: Tensor
    """(N,) flat positions in (B, T) whose hidden state predicts a sampled token ..."""
    targets: Tensor
    """(N,) ... and the sampled ids."""
    tokens: TokenBatch

    def to(self, device: torch.device) -> MicroBatch:
        tokens = TokenBatch(**{f.name: getattr(self.tokens, f.name).to(device) for f in fields(TokenBatch)})
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "tokens"}
        return MicroBatch(**moved, tokens=tokens)


def micro_batches(groups: Sequence[TrainGroup], size: int, layout: Layout) -> Iterator[tuple[list[int], MicroBatch]]:
    """Yield (indices into `groups`, batch) with `size` groups each, long groups first so that padding stays small.

    Trajectories without a sampled token take no part. A batch with none at all becomes one row of the prompt whose one
    token has weight 0: it keeps a rank without work inside the others' collectives. Each image's pixels are built once.
    Raises ValueError, naming the sample, where placeholders and images do not match.
    """
    cache: dict[str, Pixels] = {}
    order = sorted(range(len(groups)), key=lambda i: -_longest(groups[i].group))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield chosen, _collate([groups[i] for i in chosen], _Feeder(layout, cache))


def _longest(group: Group) -> int:
    return max((sum(len(t.input_ids) + len(t.token_ids) for t in one.turns) for one in group.trajectories), default=0)


@dataclass(slots=True)
class _Feeder:
    """Expands what is fed to the policy; a group's prompt and an image are worked on once."""

    layout: Layout
    cache: dict[str, Pixels]
    segments: dict[tuple[tuple[int, ...], tuple[str, ...]], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def pixels(self, handle: ImageHandle) -> Pixels:
        if handle.key not in self.cache:
            self.cache[handle.key] = self.layout.pixels(handle)
        return self.cache[handle.key]

    def segment(self, ids: tuple[int, ...], images: Sequence[ImageHandle], name: str) -> tuple[Tensor, Tensor]:
        """Expanded ids (T,) and their positions (3, T) from 0."""
        key = (ids, tuple(handle.key for handle in images))
        if key not in self.segments:
            self.segments[key] = self._expand(ids, images, name)
        return self.segments[key]

    def _expand(self, ids: Sequence[int], images: Sequence[ImageHandle], name: str) -> tuple[Tensor, Tensor]:
        plain = torch.tensor(ids, dtype=torch.int64)
        placeholders = plain == self.layout.image_token_id
        if int(placeholders.sum()) != len(images):
            raise ValueError(f"sample {name}: {int(placeholders.sum())} image placeholders for {len(images)} images")
        grids = torch.stack([self.pixels(handle).grid for handle in images]) if images else plain.new_zeros(0, 3)
        repeats = torch.ones_like(plain)
        repeats[placeholders] = grids.prod(-1) // self.layout.merge**2
        expanded = plain.repeat_interleave(repeats)
        return expanded, self.layout.positions(expanded, grids)


@dataclass(slots=True)
class _Row:
    """One trajectory under construction."""

    ids: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    sampled: list[Tensor] = field(default_factory=list)
    """Places in the row of the sampled tokens."""
    image_slots: list[Tensor] = field(default_factory=list)
    """Places in the row of the image tokens, in the order of `images`."""
    images: list[ImageHandle] = field(default_factory=list)
    length: int = 0
    next_position: int = 0

    def append(self, ids: Tensor, positions: Tensor) -> None:
        self.ids.append(ids)
        self.positions.append(positions + self.next_position)
        self.length += len(ids)
        self.next_position += int(positions.max()) + 1

    def feed(self, ids: Tensor, positions: Tensor, images: Sequence[ImageHandle], image_token_id: int) -> None:
        if images:
            self.image_slots.append((ids == image_token_id).nonzero().flatten() + self.length)
            self.images.extend(images)
        if len(ids):
            self.append(ids, positions)

    def answer(self, token_ids: Sequence[int]) -> None:
        self.sampled.append(torch.arange(self.length, self.length + len(token_ids)))
        self.append(torch.tensor(token_ids, dtype=torch.int64), torch.arange(len(token_ids)).expand(3, -1))


def _trajectory_row(trajectory: Trajectory, feeder: _Feeder, name: str) -> _Row:
    row = _Row()
    for turn in trajectory.turns:
        row.feed(*feeder.segment(turn.input_ids, turn.images, name), turn.images, feeder.layout.image_token_id)
        if turn.token_ids:
            row.answer(turn.token_ids)
    return row


def _filler_row(group: Group, feeder: _Feeder) -> _Row:
    prompt = group.prompt
    row = _Row()
    segment = feeder.segment(prompt.token_ids, prompt.images, prompt.sample.id)
    row.feed(*segment, prompt.images, feeder.layout.image_token_id)
    row.answer(prompt.token_ids[-1:])
    return row


def _collate(groups: Sequence[TrainGroup], feeder: _Feeder) -> MicroBatch:
    rows: list[_Row] = []
    old: list[float] = []
    advantages: list[float] = []
    for entry in groups:
        for trajectory, advantage in zip(entry.group.trajectories, entry.advantages, strict=True):
            if trajectory.sampled_tokens:
                rows.append(_trajectory_row(trajectory, feeder, entry.group.prompt.sample.id))
                old.extend(value for turn in trajectory.turns for value in turn.logprobs)
                advantages.extend([advantage] * trajectory.sampled_tokens)
    weight = float(bool(rows))
    if not rows:
        rows, old, advantages = [_filler_row(groups[0].group, feeder)], [0.0], [0.0]
    tokens = TokenBatch(
        old_logprobs=torch.tensor(old), advantages=torch.tensor(advantages), weights=torch.full((len(old),), weight)
    )
    return _pad(rows, feeder, tokens)


def _pad(rows: Sequence[_Row], feeder: _Feeder, tokens: TokenBatch) -> MicroBatch:
    width = max(row.length for row in rows)
    ids = pad_sequence([torch.cat(row.ids) for row in rows], batch_first=True)
    positions = pad_sequence([torch.cat(row.positions, dim=1).T for row in rows], batch_first=True)
    sampled = torch.cat([span + i * width for i, row in enumerate(rows) for span in row.sampled])
    pixel_values, image_grid, image_source = _images(rows, feeder)
    return MicroBatch(
        input_ids=ids,
        position_ids=positions.permute(2, 0, 1).contiguous(),
        pixel_values=pixel_values,
        image_grid=image_grid,
        image_slots=_cat([span + i * width for i, row in enumerate(rows) for span in row.image_slots]),
        image_source=image_source,
        predictors=sampled - 1,
        targets=ids.flatten()[sampled],
        tokens=tokens,
    )


def _images(rows: Sequence[_Row], feeder: _Feeder) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels and grids of the distinct images, and for every image token of every row its row of the features."""
    distinct = {handle.key: feeder.pixels(handle) for row in rows for handle in row.images}
    if not distinct:
        return torch.zeros(0, 0), torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    grids = torch.stack([pixels.grid for pixels in distinct.values()])
    sizes = (grids.prod(-1) // feeder.layout.merge**2).tolist()
    features = dict(zip(distinct, torch.arange(sum(sizes)).split(sizes), strict=True))
    source = torch.cat([features[handle.key] for row in rows for handle in row.images])
    return torch.cat([pixels.values for pixels in distinct.values()]), grids, source


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)  # type: ignore[arg-type]
