"""Pieces of groups -> one padded row per trajectory, each with its own copy of its images: any image-text model.

What transformers' own forward pass takes, for model families that `packing` does not know, and as its yardstick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from learner.loss import TokenBatch
from learner.rows import Layout, Picture, Piece, token_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedBatch:
    """B rows of T tokens, padded on the right, with N sampled tokens."""

    inputs: Mapping[str, Tensor]
    """input_ids, attention_mask and mm_token_type_ids (B, T) int64; of the images, row after row, what the image
    processor makes."""
    predictors: Tensor
    """(N,) flat places in (B, T) whose hidden state predicts a sampled token ..."""
    targets: Tensor
    """(N,) ... and the sampled ids."""
    tokens: TokenBatch

    @property
    def computed(self) -> int:
        """Tokens, padding included."""
        return self.inputs["input_ids"].numel()

    def to(self, device: torch.device) -> PaddedBatch:
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        predictors, targets = self.predictors.to(device), self.targets.to(device)
        return replace(self, inputs=inputs, predictors=predictors, targets=targets, tokens=self.tokens.to(device))


def pad(pieces: Sequence[Piece], layout: Layout) -> PaddedBatch:
    """One row for each trajectory; no piece: the row of a rank without work."""
    rows: list[Tensor] = []
    predictors: list[Tensor] = []
    pictures: list[Picture] = []
    for piece in pieces:
        prompt = piece.prompt
        for tail in piece.tails:
            rows.append(torch.cat([prompt.ids, *tail.ids])[: len(prompt.ids) + tail.length])
            predictors.append(torch.cat(tail.sampled) + len(prompt.ids) - 1)
            pictures += [*prompt.pictures, *(picture for _, picture in tail.pictures)]
    if not rows:
        rows, predictors = [torch.tensor([layout.filler_id])], [torch.tensor([0])]
    tails = [tail for piece in pieces for tail in piece.tails]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=layout.filler_id)
    attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    width = input_ids.shape[1]
    names = pictures[0].inputs if pictures else ()
    return PaddedBatch(
        inputs={
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "mm_token_type_ids": (input_ids == layout.image_token_id).to(torch.int64),
            **{name: torch.cat([picture.inputs[name] for picture in pictures]) for name in names},
        },
        predictors=torch.cat([places + row * width for row, places in enumerate(predictors)]),
        targets=torch.tensor([token for tail in tails for token in tail.targets] or [layout.filler_id]),
        tokens=token_batch(tails),
    )
