"""Masks of examined answers, kept until they are scored: what was decoded for a closer view is not decoded again."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from cachetools import LRUCache
from torch import Tensor

from perception.types import MaskPrompt
from reward_workers.segmenter import Segmentation

Prompts = Sequence[MaskPrompt]
Decode = Callable[[Prompts, np.ndarray, int], Segmentation]
"""(prompts, owners (N,), answers) -> the answers' masks, as `Segmenter.segment` makes them of one image."""


class MaskCache:
    """By content: an answer is the key of its image and its mask prompts. The most recently used answers stay."""

    def __init__(self, capacity: int) -> None:
        self._kept: LRUCache[tuple[str, tuple[MaskPrompt, ...]], tuple[Tensor, np.ndarray]] = LRUCache(capacity)

    def __len__(self) -> int:
        return len(self._kept)

    def segment(
        self, image: str, prompts: Prompts, owners: np.ndarray, answers: int, decode: Decode, last: bool = False
    ) -> Segmentation:
        """As `decode(prompts, owners, answers)`; each distinct answer that is not kept is decoded, once. They are kept
        from then on, or `last`: forgotten."""
        keys = [(image, tuple(prompts[i] for i in np.flatnonzero(owners == answer))) for answer in range(answers)]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        if new := list(dict.fromkeys(key for key in keys if key not in found)):
            whose = np.repeat(np.arange(len(new)), [len(own) for _, own in new])
            made = decode([prompt for _, own in new for prompt in own], whose, len(new))
            # Copies: a row alone would keep the masks of all.
            found |= {key: (made.masks[i].clone(), made.features[i].copy()) for i, key in enumerate(new)}
        for key, value in found.items():
            if last:
                self._kept.pop(key, None)
            else:
                self._kept[key] = value
        masks, features = zip(*(found[key] for key in keys), strict=True)
        return Segmentation(torch.stack(masks), np.stack(features))
