"""Supervised training of the small SAM2 model that ships with the project, from scratch, on synthetic scenes.

Prompts are what a policy will answer: boxes that are a little wrong, with or without a point inside the object.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from perception.scenes import Scene, SceneStyle
from reward_workers.segmenter import Segmenter, build, official_config

TOOL_STYLE = SceneStyle(min_objects=2, max_objects=6, texture=0.4, camouflage=0.1)
"""Crowded scenes: where objects are few, finding any foreground is a shortcut that ignores the prompt."""
PROMPTS_PER_IMAGE = 4


@dataclass(frozen=True, slots=True)
class _PromptKind:
    """Which of (first corner, second corner, point) a prompt holds, and SAM's label of each."""

    slots: tuple[int, ...]
    labels: tuple[int, ...]


BOX_AND_POINT = _PromptKind((0, 1, 2), (2, 3, 1))
BOX = _PromptKind((0, 1), (2, 3))
POINT = _PromptKind((2,), (1,))
_KINDS = ((BOX, 0.45), (BOX_AND_POINT, 0.45), (POINT, 0.1))
_EXACT_BOX = 0.2
_MULTIMASK_STEPS = 0.1
_MAX_JITTER = 0.12
_POSITION_SCALE = 0.25


def mini_config(side: int = 192, embed_dim: int = 16, width: int = 64) -> DictConfig:
    """SAM 2.1's architecture at 1.3 M parameters: masks come out at a quarter of `side`.

    Hiera's later windows span the whole map; the memory parts, unused on single images, are kept minimal.
    """
    config = official_config("tiny")
    model = config.model
    model.image_size, model.num_maskmem = side, 1
    model.sam_mask_decoder_extra_args = {"dynamic_multimask_via_stability": False}
    trunk, neck = model.image_encoder.trunk, model.image_encoder.neck
    trunk.embed_dim, trunk.stages, trunk.global_att_blocks = embed_dim, [1, 1, 2, 1], [3]
    trunk.window_spec = [8, 4, side // 16, side // 32]
    neck.d_model = neck.position_encoding.num_pos_feats = width
    neck.backbone_channel_list = [embed_dim * 8, embed_dim * 4, embed_dim * 2, embed_dim]
    attention, encoder = model.memory_attention, model.memory_encoder
    attention.num_layers, attention.d_model = 0, width
    attention.layer.d_model = attention.layer.dim_feedforward = width
    for part in (attention.layer.self_attention, attention.layer.cross_attention):
        part.embedding_dim, part.feat_sizes = width, [side // 16, side // 16]
    encoder.out_dim = encoder.position_encoding.num_pos_feats = attention.layer.cross_attention.kv_in_dim = 16
    encoder.in_dim = encoder.mask_downsampler.embed_dim = encoder.fuser.layer.dim = width
    encoder.fuser.num_layers = 1
    return config


def train_tool(
    out_dir: Path,
    scenes: Iterator[Scene],
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    device: str,
    log: Callable[[str], None],
) -> None:
    """Train a mini SAM2 and save `config.yaml` and `model.safetensors` (float16) under `out_dir`.

    Half of the steps at 128 px, where prompts are learned cheaply, half at 192 px and half the rate, for sharp edges:
    SAM2's weights do not depend on the image's size. `lr` is the peak rate of a one-cycle schedule in each half.
    Loss per prompt: BCE + Dice of the full-size logits, and the squared error of the predicted IoU (SAM's three terms).
    """
    torch.manual_seed(seed)
    coarse = Segmenter(build(mini_config(128)), device)
    # SAM's random Fourier features are too fine for a model this narrow to learn positions from.
    coarse.model.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix *= _POSITION_SCALE
    _train(coarse, scenes, steps // 2, batch, lr, np.random.default_rng(seed), log)
    config = mini_config()
    fine = Segmenter(build(config), device)
    fine.model.load_state_dict(coarse.model.state_dict())
    _train(fine, scenes, steps - steps // 2, batch, lr / 2, np.random.default_rng(seed + 1), log)
    out_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, out_dir / "config.yaml")
    state = {name: value.half().cpu().contiguous() for name, value in fine.model.state_dict().items()}
    save_file(state, out_dir / "model.safetensors")


def _train(
    segmenter: Segmenter,
    scenes: Iterator[Scene],
    steps: int,
    batch: int,
    lr: float,
    rng: np.random.Generator,
    log: Callable[[str], None],
) -> None:
    model = segmenter.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    seen: list[float] = []
    for step in range(1, steps + 1):
        drawn = list(islice((scene for scene in scenes if scene.objects), batch))
        loss, iou = _loss(segmenter, drawn, rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen.append(iou.item())
        if step % 50 == 0 or step == steps:
            at = f"{segmenter.side} px, step {step}/{steps}"
            log(f"{at}  loss {loss.item():.3f}  mask IoU {np.mean(seen[-50:]):.3f}")


@dataclass(frozen=True, slots=True)
class _Prompts:
    image: np.ndarray
    """(N,) index of the scene."""
    coords: np.ndarray
    """(N, 3, 2): two box corners and a point, scene pixels."""
    truth: Tensor
    """(N, H, W) float."""


def _loss(segmenter: Segmenter, scenes: list[Scene], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Mean loss and mask IoU over the prompts of a batch."""
    prompts = _draw_prompts(scenes, rng, segmenter.device)
    maps = segmenter.features(segmenter.pixels([scene.image for scene in scenes]))
    scale = segmenter.side / scenes[0].image.shape[0]
    coords = torch.from_numpy(prompts.coords * scale).float().to(segmenter.device)
    kinds = rng.choice(len(_KINDS), len(coords), p=[share for _, share in _KINDS])
    multimask = bool(rng.random() < _MULTIMASK_STEPS)
    losses, ious = [], []
    for index, (kind, _) in enumerate(_KINDS):
        rows = np.flatnonzero(kinds == index)
        if not len(rows):
            continue
        image = torch.from_numpy(prompts.image[rows]).to(segmenter.device)
        labels = torch.tensor(kind.labels, dtype=torch.int32, device=segmenter.device).expand(len(rows), -1)
        chosen = coords[torch.from_numpy(rows)][:, list(kind.slots)]
        logits, predicted = segmenter.predict([level[image] for level in maps], chosen, labels, multimask)
        loss, iou = _prompt_loss(logits, predicted, prompts.truth[torch.from_numpy(rows)])
        losses.append(loss)
        ious.append(iou)
    return torch.cat(losses).mean(), torch.cat(ious).mean()


def _prompt_loss(logits: Tensor, predicted: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """logits (N, M, h, w), predicted IoU (N, M), truth (N, H, W) -> loss (N,) and IoU (N,).

    With M = 3 only the best of the three masks is taught (SAM's rule for ambiguous prompts), every IoU head always.
    """
    full = F.interpolate(logits, truth.shape[-2:], mode="bilinear", align_corners=False)
    target = truth[:, None].expand_as(full)
    bce = F.binary_cross_entropy_with_logits(full, target, reduction="none").mean((2, 3))
    chance = full.sigmoid()
    dice = 1 - (2 * (chance * target).sum((2, 3)) + 1) / ((chance + target).sum((2, 3)) + 1)
    with torch.no_grad():
        mask = full > 0
        both = (mask & (target > 0)).sum((2, 3))
        iou = both / (mask | (target > 0)).sum((2, 3)).clamp(min=1)
    shape = bce + dice
    best = shape.argmin(1, keepdim=True)
    quality = (predicted - iou).square().mean(1)
    return shape.gather(1, best)[:, 0] + quality, iou.gather(1, best)[:, 0]


def _draw_prompts(scenes: list[Scene], rng: np.random.Generator, device: torch.device) -> _Prompts:
    image, boxes, points, truth = [], [], [], []
    for index, scene in enumerate(scenes):
        for pick in rng.integers(len(scene.objects), size=PROMPTS_PER_IMAGE):
            target = scene.objects[pick]
            rows, columns = np.nonzero(target.mask)
            inside = rng.integers(len(rows))
            image.append(index)
            boxes.append(target.box)
            points.append((columns[inside], rows[inside]))
            truth.append(target.mask)
    exact = rng.random((len(boxes), 1)) < _EXACT_BOX
    spread = np.where(exact, 0, rng.uniform(0, _MAX_JITTER, (len(boxes), 1)))
    corners = _jitter(np.array(boxes, np.float32), spread, rng).reshape(-1, 2, 2)
    coords = np.concatenate([corners, np.array(points, np.float32)[:, None]], 1)
    return _Prompts(np.array(image), coords, torch.from_numpy(np.stack(truth)).float().to(device))


def _jitter(boxes: np.ndarray, spread: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move every edge by a normal error of `spread` (N, 1) times the box's own width or height."""
    size = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    return (boxes + rng.normal(size=boxes.shape) * spread * size).astype(np.float32)
