"""Supervised training of the small SAM2 model that ships with the project, from scratch, on synthetic scenes.

Prompts are what a policy will answer: boxes that are a little wrong, with or without a point inside the object.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from reward_workers.segmenter import Segmenter, build, official_config
from synthetic.scenes import Scene, SceneStyle

TOOL_STYLE = SceneStyle(min_objects=2, max_objects=6, texture=0.4, camouflage=0.1)
"""Crowded scenes: where objects are few, finding any foreground is a shortcut that ignores the prompt."""
PROMPTS_PER_IMAGE = 4


_LABELS = (2, 3, 1)
"""SAM's label of each slot of a prompt: first corner, second corner, point."""
_KINDS: dict[tuple[int, ...], float] = {(0, 1): 0.45, (0, 1, 2): 0.45, (2,): 0.1}
"""Slots that a prompt holds -> share of such prompts: a box, a box and a point, a point."""
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
    out: Path, scenes: Iterator[Scene], steps: int = 3600, batch: int = 8, lr: float = 2e-3, seed: int = 0
) -> None:
    """Train a mini SAM2 and save `config.yaml` and `model.safetensors` (float16) under `out`.

    Half of the steps at 128 px, where prompts are learned cheaply, half at 192 px and half the rate, for sharp edges:
    SAM2's weights do not depend on the image's size. `lr` is the peak rate of a one-cycle schedule in each half.
    Loss per prompt: BCE + Dice of the full-size logits, and the squared error of the predicted IoU (SAM's three terms).
    """
    torch.manual_seed(seed)
    coarse = Segmenter(build(mini_config(128)), "cpu")
    # SAM's random Fourier features are too fine for a model this narrow to learn positions from.
    coarse.model.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix *= _POSITION_SCALE
    _train(coarse, scenes, steps // 2, batch, lr, np.random.default_rng(seed))
    config = mini_config()
    fine = Segmenter(build(config), "cpu")
    fine.model.load_state_dict(coarse.model.state_dict())
    _train(fine, scenes, steps - steps // 2, batch, lr / 2, np.random.default_rng(seed + 1))
    out.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, out / "config.yaml")
    state = {name: value.half().contiguous() for name, value in fine.model.state_dict().items()}
    save_file(state, out / "model.safetensors")


def _train(
    segmenter: Segmenter, scenes: Iterator[Scene], steps: int, batch: int, lr: float, rng: np.random.Generator
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
            print(f"{at}  loss {loss.item():.3f}  mask IoU {np.mean(seen[-50:]):.3f}", flush=True)


def _loss(segmenter: Segmenter, scenes: list[Scene], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Mean loss and mask IoU over the prompts of a batch."""
    scene, points, truth = _draw_prompts(scenes, rng)
    maps = segmenter.features(segmenter.pixels([scene.image for scene in scenes]))
    coords = (points * (segmenter.side / scenes[0].image.shape[0])).float()
    kinds = torch.from_numpy(rng.choice(len(_KINDS), len(coords), p=list(_KINDS.values())))
    multimask = bool(rng.random() < _MULTIMASK_STEPS)
    losses, ious = [], []
    for kind, slots in enumerate(_KINDS):
        rows = torch.nonzero(kinds == kind)[:, 0]
        if not len(rows):
            continue
        labels = torch.tensor([_LABELS[slot] for slot in slots], dtype=torch.int32).expand(len(rows), -1)
        of_scene = [level[scene[rows]] for level in maps]
        logits, predicted = segmenter.predict(of_scene, coords[rows][:, list(slots)], labels, multimask)
        loss, iou = _prompt_loss(logits, predicted, truth[rows])
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


def _draw_prompts(scenes: list[Scene], rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """N prompts: index of the scene (N,), two box corners and a point (N, 3, 2) in its pixels, true mask (N, H, W)."""
    drawn = []
    for i, scene in enumerate(scenes):
        for pick in rng.integers(len(scene.objects), size=PROMPTS_PER_IMAGE):
            target = scene.objects[pick]
            inside = np.argwhere(target.mask)
            row, column = inside[rng.integers(len(inside))]
            drawn.append((i, target.box, (column, row), target.mask))
    index, boxes, points, truth = (np.array(column) for column in zip(*drawn, strict=True))
    exact = rng.random((len(boxes), 1)) < _EXACT_BOX
    spread = np.where(exact, 0, rng.uniform(0, _MAX_JITTER, (len(boxes), 1)))
    corners = _jitter(boxes.astype(np.float32), spread, rng).reshape(-1, 2, 2)
    coords = np.concatenate([corners, points.astype(np.float32)[:, None]], 1)
    return torch.from_numpy(index), torch.from_numpy(coords), torch.from_numpy(truth).float()


def _jitter(boxes: np.ndarray, spread: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move every edge by a normal error of `spread` (N, 1) times the box's own width or height."""
    size = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    return (boxes + rng.normal(size=boxes.shape) * spread * size).astype(np.float32)
