"""Rows: groups as the tokens a policy computes on, cut into pieces and binned into micro-batches.

A group is its prompt, once, and one tail per trajectory: [sampled | fed | sampled | ...], the last sampled token left
out because it predicts nothing. A trajectory of two turns with the prompt 7 8, the answer 4 5, the fed ids 9 9 and the
answer 6 3 is, as a `Tail`,

    place    0  1  2  3  4  5
    ids      4  5  9  9  6  3    length = 5: the 3 is not computed on
    sampled  0  1        4  5    targets = (4, 5, 6, 3)

`learner.packing` and `learner.families.generic` turn pieces into the tensors of a micro-batch.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from learner.loss import TokenBatch
from perception.errors import DataError
from perception.types import Group, ImageHandle, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One image as the policy takes it."""

    key: str
    tokens: Tensor
    """(k,) int64: the ids that stand in the row for its placeholder."""
    inputs: Mapping[str, Tensor]
    """Output of the policy's image processor; empty where `features` are known."""
    grid: Tensor | None = None
    """(3,) int64, temporal, height and width in patches, for policies that take images in native resolution."""
    features: Tensor | None = None
    """(levels, k, hidden size): what replaces the k tokens, then what deeper layers add to them (Qwen3-VL). Known
    beforehand where the vision tower is frozen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The properties of a policy that its rows depend on."""

    image_token_id: int
    """Stands for one image in an unexpanded prompt."""
    shown_id: int
    """Stands for one of its features in a row: nearly always the same id."""
    filler_id: int
    """Any ordinary id: what a rank without work computes on."""
    picture: Callable[[ImageHandle], Picture]
    positions: Callable[[Tensor, Tensor], Tensor] | None = None
    """(ids (T,), grids (images, 3)) -> positions (3, T) from 0; None where the policy makes its own."""

    def size(self, picture: Picture) -> int:
        """Number of the image's features."""
        return int((picture.tokens == self.shown_id).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Tokens that are fed at once, placeholders expanded."""

    ids: Tensor
    """(T,) int64."""
    positions: Tensor
    """(3, T) int64 from 0; (3, 0) where the policy makes its own."""
    pictures: tuple[tuple[Tensor, Picture], ...] = ()
    """Where in `ids` each image's features stand, and the image."""

    @property
    def end(self) -> int:
        """The first position after it."""
        return int(self.positions.max()) + 1 if self.positions.numel() else 0


@dataclass(slots=True)
class Tail:
    """The tokens of one trajectory after the prompt (see the example above). Places count from the prompt's end.

    `group` and `trajectory` are the numbers of both in the groups that `pieces` was given."""

    group: int
    trajectory: int
    advantage: float
    ids: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    sampled: list[Tensor] = field(default_factory=list)
    """Places of the sampled tokens, that of the last one included although it is not in the row."""
    pictures: list[tuple[Tensor, Picture]] = field(default_factory=list)
    """Where each image's features stand, and the image."""
    targets: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    """Log-probs of the targets, as the rollout engine reported them."""
    length: int = 0
    """Tokens in the row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A group, or as many of its trajectories as fit into one micro-batch."""

    prompt: Segment
    tails: tuple[Tail, ...]

    @property
    def pictures(self) -> list[Picture]:
        """The images of its prompt and of its tails."""
        own = [*self.prompt.pictures, *(pair for tail in self.tails for pair in tail.pictures)]
        return [picture for _, picture in own]

    @property
    def packed(self) -> int:
        """Tokens as one row."""
        return len(self.prompt.ids) + sum(tail.length for tail in self.tails)

    @property
    def rows(self) -> int:
        """Tokens as one row per trajectory."""
        return sum(len(self.prompt.ids) + tail.length for tail in self.tails)

    def cost(self, padded: bool) -> int:
        """Tokens that are computed on: as one row or, `padded`, as one row per trajectory, padded to one length."""
        if not padded:
            return self.packed
        return len(self.tails) * (len(self.prompt.ids) + max((tail.length for tail in self.tails), default=0))


Expand = Callable[[Sequence[int], Sequence[ImageHandle], Sequence[int]], Segment]
"""Puts the tokens of images in the place of their placeholders, unless an engine has, whose ids come third."""


def pieces(groups: Sequence[Group], layout: Layout, budget: int, padded: bool = False) -> Iterator[Piece]:
    """Groups in pieces of at most `budget` tokens, or of one trajectory where that alone is longer.

    Trajectories without a sampled token take no part, nor do those that engine or reward worker failed; a group of
    nothing else is not looked at, nor is its image. Raises ValueError, naming the sample, where placeholders and images
    do not match, the engine made more or fewer tokens of an image, a trajectory does not begin with the prompt, or an
    image cannot be read (DataError).
    """
    taking_part = {i: group for i, group in enumerate(groups) if any(one.learnable for one in group.trajectories)}
    pictures = _pictures(taking_part.values(), layout)
    for number, group in taking_part.items():
        prompt, name = group.prompt, group.prompt.sample.id
        expand = partial(_segment, layout, pictures, name)
        made = next(one for one in group.trajectories if one.learnable).turns[0].expanded_ids
        first = expand(prompt.token_ids, prompt.images, made)
        tails: list[Tail] = []
        for index, trajectory in enumerate(group.trajectories):
            if not trajectory.learnable:
                continue
            if trajectory.turns[0].input_ids != prompt.token_ids or trajectory.turns[0].images != prompt.images:
                raise ValueError(f"sample {name}: trajectory {index} does not begin with its group's prompt")
            tail = _tail(number, index, trajectory, expand, first.end)
            if tails and Piece(prompt=first, tails=(*tails, tail)).cost(padded) > budget:
                yield Piece(prompt=first, tails=tuple(tails))
                tails = []
            tails.append(tail)
        if tails:
            yield Piece(prompt=first, tails=tuple(tails))


def bins(work: Sequence[Piece], budget: int, padded: bool = False) -> list[list[Piece]]:
    """Micro-batches of at most `budget` tokens: first-fit decreasing. A larger piece gets one of its own."""
    filled: list[list[Piece]] = []
    sizes: list[int] = []
    for piece in sorted(work, key=lambda piece: -piece.cost(padded)):
        size = piece.cost(padded)
        place = next((i for i, taken in enumerate(sizes) if taken + size <= budget), len(filled))
        if place == len(filled):
            filled.append([])
            sizes.append(0)
        filled[place].append(piece)
        sizes[place] += size
    return filled


def token_batch(tails: Sequence[Tail]) -> TokenBatch:
    """What the objective needs to know of the tails' sampled tokens, in order; no tail: one masked filler token."""
    lengths = [len(tail.targets) for tail in tails] or [1]
    return TokenBatch(
        rollout_logprobs=torch.tensor([value for tail in tails for value in tail.logprobs] or [0.0]),
        advantages=torch.tensor([tail.advantage for tail in tails] or [0.0]).repeat_interleave(torch.tensor(lengths)),
        loss_mask=torch.full((sum(lengths),), float(bool(tails))),
        sequence=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
    )


def _pictures(groups: Iterable[Group], layout: Layout) -> dict[str, Picture]:
    """Every image of the groups by key, each prepared once, on all cores: decoding leaves Python's lock."""
    shown: dict[str, tuple[str, ImageHandle]] = {}
    for group in groups:
        fed = [turn.images for trajectory in group.trajectories if trajectory.learnable for turn in trajectory.turns]
        name = group.prompt.sample.id
        shown |= {handle.key: (name, handle) for images in (group.prompt.images, *fed) for handle in images}

    def prepared(one: tuple[str, ImageHandle]) -> Picture:
        sample, handle = one
        try:
            return layout.picture(handle)
        except DataError as error:
            raise DataError(f"sample {sample}: {error}", error.reason) from error

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return dict(zip(shown, threads.map(prepared, shown.values()), strict=True))


def _segment(
    layout: Layout,
    known: Mapping[str, Picture],
    sample: str,
    ids: Sequence[int],
    images: Sequence[ImageHandle],
    made: Sequence[int],
) -> Segment:
    """What an engine made of unexpanded ids and their images or, where none did, the images' tokens in the place of
    their placeholders. `sample` is named in the error."""
    places = [place for place, token in enumerate(ids) if token == layout.image_token_id]
    if len(places) != len(images):
        raise ValueError(f"sample {sample}: {len(places)} image placeholders for {len(images)} images")
    pictures = [known[handle.key] for handle in images]
    parts, start = [torch.tensor(made, dtype=torch.int64)], 0
    if not made:
        for place, picture in zip(places, pictures, strict=True):
            parts += [torch.tensor(ids[start:place], dtype=torch.int64), picture.tokens]
            start = place + 1
        parts.append(torch.tensor(ids[start:], dtype=torch.int64))
    expanded = torch.cat(parts)
    shown, sizes = (expanded == layout.shown_id).nonzero().flatten(), [layout.size(picture) for picture in pictures]
    if len(shown) != sum(sizes):
        raise ValueError(f"sample {sample}: the engine made {len(shown)} image tokens, the learner {sum(sizes)}")
    grids = [picture.grid for picture in pictures if picture.grid is not None]
    positions = expanded.new_zeros(3, 0)
    if layout.positions is not None and len(expanded):
        positions = layout.positions(expanded, torch.stack(grids) if grids else expanded.new_zeros(0, 3))
    return Segment(ids=expanded, positions=positions, pictures=tuple(zip(shown.split(sizes), pictures, strict=True)))


def _tail(group: int, index: int, trajectory: Trajectory, expand: Expand, next_position: int) -> Tail:
    tail = Tail(group, index, trajectory.advantage)
    for number, turn in enumerate(trajectory.turns):
        if number:
            fed = expand(turn.input_ids, turn.images, turn.expanded_ids)
            tail.pictures += [(tail.length + places, picture) for places, picture in fed.pictures]
            tail.ids.append(fed.ids)
            tail.positions.append(fed.positions + next_position)
            tail.length += len(fed.ids)
            next_position += fed.end
        tail.sampled.append(torch.arange(len(turn.token_ids)) + tail.length)
        tail.ids.append(torch.tensor(turn.token_ids, dtype=torch.int64))
        tail.positions.append(torch.arange(len(turn.token_ids)).expand(3, -1) + next_position)
        tail.length += len(turn.token_ids)
        next_position += len(turn.token_ids)
    tail.targets = tuple(token for turn in trajectory.turns for token in turn.token_ids)
    tail.logprobs = tuple(value for turn in trajectory.turns for value in turn.logprobs)
    # Nothing that follows the last sampled token is learned from, nor is the token itself computed on.
    tail.length = int(torch.cat(tail.sampled)[-1])
    tail.pictures = [(places, picture) for places, picture in tail.pictures if places[0] < tail.length]
    return tail
