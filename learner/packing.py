"""Packed rows: pieces of groups end to end in one row, [prompt | tail | tail | ...] for each piece.

A tail attends to its prompt and to itself; its positions go on from the prompt's. Every image of the row is in it
once, however many tails refer to it. Log-probs and gradients are those of one padded row per trajectory
(`tests/unit/test_exactness.py`).

The prompt 7 8 9 with the answers 4 5 6 and 3, padded to a multiple of four tokens, is

    place       0  1  2  3  4  5  6  7
    input_ids   7  8  9  4  5  0  0  0    an answer's last token is left out: it predicts nothing
    positions   0  1  2  3  4  0  0  0
    part        0  0  0  1  1  3  3  3    part 2, the tail of the answer 3, is empty
    lengths     PieceLengths(prompt=3, tails=(2, 0))
    targets     4  5  6  3                the sampled ids ...
    predictors  2  3  4  2                ... and the place whose hidden state predicts each
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from learner.loss import TokenBatch
from learner.rows import Layout, Picture, Piece, Segment, token_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceLengths:
    """Tokens of a piece's parts in the row."""

    prompt: int
    tails: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.prompt + sum(self.tails)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One row of T tokens over I distinct images, with N sampled tokens (see the example above)."""

    input_ids: Tensor
    """(1, T) int64."""
    position_ids: Tensor
    """(3, 1, T) int64."""
    lengths: tuple[PieceLengths, ...]
    """The row's pieces in order; what of T is left after them is padding."""
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


def pack(pieces: Sequence[Piece], layout: Layout, multiple: int = 1) -> PackedBatch:
    """One row of all pieces, padded to a multiple of `multiple` tokens; no piece: the row of a rank without work."""
    pieces = pieces or (_filler(layout),)
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    predictors: list[Tensor] = []
    images: list[tuple[Tensor, Picture]] = []
    place = 0
    for piece in pieces:
        ids.append(piece.prompt.ids)
        positions.append(piece.prompt.positions)
        images += [(place + shown, picture) for shown, picture in piece.prompt.pictures]
        place += len(piece.prompt.ids)
        last_of_prompt = place - 1
        for tail in piece.tails:
            ids.append(torch.cat(tail.ids)[: tail.length])
            positions.append(torch.cat(tail.positions, dim=1)[:, : tail.length])
            sampled = torch.cat(tail.sampled)
            predictors.append(torch.where(sampled > 0, place + sampled - 1, last_of_prompt))
            images += [(place + shown, picture) for shown, picture in tail.pictures]
            place += tail.length
    padding = -place % multiple
    tails = [tail for piece in pieces for tail in piece.tails]
    pictures, image_slots, image_source = _images(images)
    return PackedBatch(
        input_ids=pad(torch.cat(ids), (0, padding), value=layout.filler_id)[None],
        position_ids=pad(torch.cat(positions, dim=1), (0, padding))[:, None],
        lengths=tuple(PieceLengths(prompt=len(p.prompt.ids), tails=tuple(t.length for t in p.tails)) for p in pieces),
        pictures=pictures,
        image_slots=image_slots,
        image_source=image_source,
        predictors=torch.cat(predictors or [torch.tensor([0])]),
        targets=torch.tensor([token for tail in tails for token in tail.targets] or [layout.filler_id]),
        tokens=token_batch(tails),
    )


def part_sizes(lengths: Sequence[PieceLengths], row: int) -> tuple[np.ndarray, np.ndarray]:
    """For each part of a row of `row` tokens, its padding the last: its tokens, and the number of the prompt that it
    goes on from; of a prompt and the padding, their own number. Both (parts,) int64."""
    sizes: list[int] = []
    prompts: list[int] = []
    for piece in lengths:
        prompts += [len(sizes)] * (1 + len(piece.tails))
        sizes += [piece.prompt, *piece.tails]
    prompts.append(len(sizes))
    sizes.append(row - sum(sizes))
    return np.array(sizes), np.array(prompts)


def token_parts(lengths: Sequence[PieceLengths], row: int) -> Tensor:
    """(2, T) int32: the number of each token's part in a row, and that of the prompt which the part goes on from.

    Token q may attend to token k <= q where part[k] is part[q] or prompt[q].
    """
    sizes, prompts = part_sizes(lengths, row)
    return torch.from_numpy(np.repeat([np.arange(len(sizes)), prompts], sizes, axis=1).astype(np.int32))


def _filler(layout: Layout) -> Piece:
    prompt = Segment(ids=torch.tensor([layout.filler_id]), positions=torch.zeros(3, 1, dtype=torch.int64))
    return Piece(prompt=prompt, tails=())


def _images(places: Sequence[tuple[Tensor, Picture]]) -> tuple[tuple[Picture, ...], Tensor, Tensor]:
    """The distinct images; for every image token its place in the row, and its row of their features."""
    distinct = {picture.key: picture for _, picture in places}
    sizes = list({picture.key: len(slots) for slots, picture in places}.values())
    features = dict(zip(distinct, torch.arange(sum(sizes)).split(sizes), strict=True))
    none = torch.zeros(0, dtype=torch.int64)
    source = [features[picture.key] for _, picture in places]
    return tuple(distinct.values()), torch.cat([none, *(slots for slots, _ in places)]), torch.cat([none, *source])
