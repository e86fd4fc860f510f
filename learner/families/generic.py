"""Padded rows: one per trajectory, each with its own copy of its images, through transformers' own forward pass.

For any image-text model; packed rows are tested against them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from learner.families import TOKEN_TYPES
from learner.loss import TokenBatch
from learner.policy import Policy
from learner.rows import Picture, Piece, token_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedBatch:
    """B rows of T tokens, padded on the right, with N sampled tokens."""

    inputs: Mapping[str, Tensor]
    """Arguments of the model's forward pass: input_ids, attention_mask and, where it takes them, token types (B, T)
    int64; what the processor makes of the images, row after row."""
    predictors: Tensor
    """(N,) flat places in (B, T) whose hidden state predicts a sampled token ..."""
    targets: Tensor
    """(N,) ... and the sampled ids."""
    tokens: TokenBatch

    @property
    def computed(self) -> int:
        """Tokens, padding included."""
        return self.inputs["input_ids"].numel()


class PaddedPolicy(Policy):
    """Any image-text model of transformers on padded rows, by its own forward pass."""

    padded = True

    def collate(self, pieces: Sequence[Piece]) -> PaddedBatch:
        rows: list[Tensor] = []
        predictors: list[Tensor] = []
        pictures: list[Picture] = []
        for piece in pieces:
            prompt = piece.prompt
            for tail in piece.tails:
                rows.append(torch.cat([prompt.ids, *tail.ids])[: len(prompt.ids) + tail.length])
                predictors.append(torch.cat(tail.sampled) + len(prompt.ids) - 1)
                pictures += [picture for _, picture in (*prompt.pictures, *tail.pictures)]
        if not pictures:  # every rank runs the vision tower, so that all gather and reduce the same weights
            pictures.append(self.blank)
            rows.append(self.blank.tokens)
            predictors.append(torch.arange(0 if pieces else 1))
        tails = [tail for piece in pieces for tail in piece.tails]
        input_ids = pad_sequence(rows, batch_first=True, padding_value=self.layout.filler_id)
        attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return PaddedBatch(
            inputs={"input_ids": input_ids, "attention_mask": attention_mask, **self.inputs(input_ids, pictures)},
            predictors=torch.cat([places + row * input_ids.shape[1] for row, places in enumerate(predictors)]),
            targets=torch.tensor([token for tail in tails for token in tail.targets] or [self.layout.filler_id]),
            tokens=token_batch(tails),
        )

    def inputs(self, ids: Tensor, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        """Arguments of the forward pass beside ids (B, T) and their mask; images in the order of the rows."""
        taken = signature(self.model.model.forward).parameters
        types = {name: (ids == self.model.config.image_token_id).long() for name in TOKEN_TYPES if name in taken}
        names = pictures[0].inputs if pictures else ()
        return types | {name: end_to_end([picture.inputs[name] for picture in pictures]) for name in names}

    def forward(self, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
        """(N,) float32 log pi(token) and (N,) float32 entropy in nats."""
        hidden = self.model.model(**batch.inputs, use_cache=False).last_hidden_state
        return self.head(hidden.flatten(0, 1).index_select(0, batch.predictors), batch.targets, self.vocabulary)


def end_to_end(parts: Sequence[Tensor]) -> Tensor:
    """The parts along the first axis, padded with zeros along the others, as processors pad several images' tiles."""
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    whole = parts[0].new_zeros(sum(map(len, parts)), *largest)
    for rows, part in zip(whole.split([len(part) for part in parts]), parts, strict=True):
        rows[(slice(None), *map(slice, part.shape[1:]))] = part
    return whole
