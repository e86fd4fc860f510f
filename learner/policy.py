"""The policy as the learner sees it: log-probs of sampled tokens under the distribution the engine samples from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from learner import vision_attention
from learner.batch import Layout, MicroBatch, Pixels
from perception.images import decode
from perception.types import ImageHandle, PolicySpec

BANNED_LOGIT = -1e9
"""What the engine adds to the logit of a banned id: a probability of exactly 0, and no NaN in the entropy."""
HEAD_ELEMENTS = 1 << 26
"""Logits held at once; a longer batch goes through the vocabulary head in recomputed chunks."""


class Policy(nn.Module):
    """A Qwen2.5-VL whose forward pass maps a `MicroBatch` to log-probs and entropies of its N sampled tokens.

    The vision tower runs once per image, the vocabulary head only where a sampled token is predicted.
    """

    def __init__(self, spec: PolicySpec, temperature: float, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.model = AutoModelForImageTextToText.from_pretrained(
            spec.path, dtype=getattr(torch, spec.dtype), attn_implementation="sdpa", local_files_only=True
        )
        self.model.model.visual.config._attn_implementation_internal = vision_attention.NAME
        self.temperature = temperature
        self.merge: int = self.model.config.vision_config.spatial_merge_size
        self.register_buffer("banned", torch.tensor(spec.banned_token_ids, dtype=torch.int64), persistent=False)
        self.train()
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(N,) float32 log pi(token), with gradient, and (N,) float32 entropy in nats, without."""
        body = self.model.model
        embeddings = body.get_input_embeddings()(batch.input_ids)
        batch_size, width, hidden_size = embeddings.shape
        flat = embeddings.view(-1, hidden_size)
        pixel_values, grid = (batch.pixel_values, batch.image_grid) if len(batch.image_grid) else self._blank()
        features = torch.cat(body.get_image_features(pixel_values, grid).pooler_output)
        flat = flat.index_copy(0, batch.image_slots, features.index_select(0, batch.image_source).to(flat.dtype))
        hidden = body.language_model(
            inputs_embeds=flat.view(batch_size, width, hidden_size), position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state
        return self._head(hidden.reshape(-1, hidden_size).index_select(0, batch.predictors), batch.targets)

    def _blank(self) -> tuple[Tensor, Tensor]:
        """One image token nobody reads: under ZeRO-3 every rank must run the vision tower, text-only batch or not."""
        vision = self.model.config.vision_config
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        device = self.model.device
        return torch.zeros(self.merge**2, width, device=device), torch.tensor(
            [[1, self.merge, self.merge]], device=device
        )

    def _head(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        rows = max(1, HEAD_ELEMENTS // self.model.config.get_text_config().vocab_size)
        if len(hidden) <= rows:
            return self._token_logprobs(hidden, targets)
        chunks = [
            checkpoint(self._token_logprobs, h, t, use_reentrant=False)
            for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        logprobs, entropies = zip(*chunks, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _token_logprobs(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """log_softmax(masked logits / temperature) at the targets, and the entropy of the same distribution."""
        logits = self.model.lm_head(hidden).float().index_fill(1, self.banned, BANNED_LOGIT) / self.temperature
        normaliser = logits.logsumexp(-1)
        logprobs = logits.gather(1, targets[:, None]).squeeze(1) - normaliser
        with torch.no_grad():
            expected = (torch.exp(logits - normaliser[:, None]) * logits).sum(-1)
        return logprobs, (normaliser - expected).detach()

    def positions(self, ids: Tensor, grids: Tensor) -> Tensor:
        """M-RoPE positions (3, T) of expanded ids (T,) holding the images of `grids` (images, 3)."""
        is_image = (ids == self.model.config.image_token_id).to(torch.int32)
        positions, _ = self.model.model.get_rope_index(ids[None], is_image[None], image_grid_thw=grids)
        return positions[:, 0]


def make_layout(policy: Policy, spec: PolicySpec, fetch: Callable[[object], bytes]) -> Layout:
    """How rows are built for this policy; `fetch` turns an `ImageHandle.ref` into the encoded bytes."""
    # The torchvision backend is the engine's: resized pixels then agree to the last bit.
    processor = AutoImageProcessor.from_pretrained(spec.path, backend="torchvision", local_files_only=True)

    def pixels(handle: ImageHandle) -> Pixels:
        image = torch.tensor(decode(fetch(handle.ref))).permute(2, 0, 1)
        inputs = processor(images=[image], return_tensors="pt")
        return Pixels(values=inputs["pixel_values"], grid=inputs["image_grid_thw"][0])

    return Layout(image_token_id=spec.image_token_id, merge=policy.merge, positions=policy.positions, pixels=pixels)
