"""Pieces of groups -> one packed row: [prompt | tail | tail | ...] for each piece, one piece after the other.

A tail sees its prompt and itself; its positions go on from the prompt's. Every image of the row is in it once, however
many tails refer to it. Log-probs and gradients are those of one padded row per trajectory (`tests/test_exactness.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from learner.loss import TokenBatch
from learner.rows import Layout, Picture, Piece, token_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Lengths of a piece's parts in the row."""

    prompt: int
    tails: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.prompt + sum(self.tails)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One row of T tokens over I distinct images, with N sampled tokens."""

    input_ids: Tensor
    """(1, T) int64."""
    position_ids: Tensor
    """(3, 1, T) int64."""
    spans: tuple[Span, ...]
    """Of the row's pieces in order; what of T is left after them is padding."""
    pictures: tuple[Picture, ...]
    """The I images."""
    image_slots: Tensor
    """(K,) places in T that hold an image token ..."""
    image_source: Tensor
    """(K,) ... and the row of the I images' features, end to end, that each one takes."""
    predictors: Tensor
    """(N,) places in T whose hidden state predicts a sampled token ..."""
    targets: Tensor
    """(N,) ... and the sampled ids."""
    tokens: TokenBatch

    @property
    def computed(self) -> int:
        """Tokens, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> PackedBatch:
        names = ("input_ids", "position_ids", "image_slots", "image_source", "predictors", "targets")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, tokens=self.tokens.to(device), **moved)


def pack(pieces: Sequence[Piece], layout: Layout, multiple: int = 1) -> PackedBatch:
    """One row of all pieces, padded to a multiple of `multiple` tokens; no piece: the row of a rank without work."""
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    predictors: list[Tensor] = []
    places: list[tuple[int, Picture]] = []
    start = 0
    for piece in pieces:
        prompt, head = piece.prompt, len(piece.prompt.ids)
        ids.append(prompt.ids)
        positions.append(prompt.positions)
        places += [(start + where, picture) for where, picture in zip(prompt.starts, prompt.pictures, strict=True)]
        place = start + head
        for tail in piece.tails:
            ids.append(torch.cat(tail.ids)[: tail.length])
            positions.append(torch.cat(tail.positions, dim=1)[:, : tail.length])
            sampled = torch.cat(tail.sampled)
            # What comes first after the prompt is predicted by the prompt's last token, wherever the tail lies.
            predictors.append(torch.where(sampled > 0, place + sampled - 1, start + head - 1))
            places += [(place + where, picture) for where, picture in tail.pictures]
            place += tail.length
        start = place
    spans = tuple(Span(prompt=len(p.prompt.ids), tails=tuple(t.length for t in p.tails)) for p in pieces)
    if not pieces:
        ids, positions = [torch.tensor([layout.filler_id])], [torch.zeros(3, 1, dtype=torch.int64)]
        predictors, spans, start = [torch.tensor([0])], (Span(prompt=1, tails=()),), 1
    padding = -start % multiple
    tails = [tail for piece in pieces for tail in piece.tails]
    pictures, image_slots, image_source = _images(places)
    return PackedBatch(
        input_ids=pad(torch.cat(ids), (0, padding), value=layout.filler_id)[None],
        position_ids=pad(torch.cat(positions, dim=1), (0, padding))[:, None],
        spans=spans,
        pictures=pictures,
        image_slots=image_slots,
        image_source=image_source,
        predictors=torch.cat(predictors),
        targets=torch.tensor([token for tail in tails for token in tail.targets] or [layout.filler_id]),
        tokens=token_batch(tails),
    )


def _images(places: Sequence[tuple[int, Picture]]) -> tuple[tuple[Picture, ...], Tensor, Tensor]:
    """The distinct images; for every image token its place in the row, and its row of their features."""
    distinct = {picture.key: picture for _, picture in places}
    sizes = [len(picture.tokens) for picture in distinct.values()]
    features = dict(zip(distinct, torch.arange(sum(sizes)).split(sizes) if sizes else (), strict=True))
    none = torch.zeros(0, dtype=torch.int64)
    slots = [torch.arange(len(picture.tokens)) + start for start, picture in places]
    source = [features[picture.key] for _, picture in places]
    return tuple(distinct.values()), torch.cat([none, *slots]), torch.cat([none, *source])


def owners(spans: Sequence[Span], length: int) -> tuple[Tensor, Tensor]:
    """For each of the row's `length` tokens: its part's number, and the number of the prompt its part goes on from.

    Both (T,) int32. Token q may attend to token k <= q where part[k] is part[q] or prompt[q]. Padding is a part.
    """
    parts: list[int] = []
    prompts: list[int] = []
    lengths: list[int] = []
    for prompt, size in _parts(spans):
        parts.append(len(parts))
        prompts.append(parts[-1] if prompt else prompts[-1])
        lengths.append(size)
    lengths.append(length - sum(lengths))
    numbers = torch.tensor([[*parts, len(parts)], [*prompts, len(parts)]], dtype=torch.int32)
    part, prompt_of = numbers.repeat_interleave(torch.tensor(lengths), dim=1)
    return part, prompt_of


def _parts(spans: Sequence[Span]) -> Iterator[tuple[bool, int]]:
    """(is a prompt, length) of every part of the row."""
    for span in spans:
        yield True, span.prompt
        for tail in span.tails:
            yield False, tail
