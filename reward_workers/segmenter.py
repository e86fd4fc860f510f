"""SAM2 as a batched mask tool: images are encoded once, all prompts of a group are decoded together.

The only file that knows sam2. It calls the model's parts directly: sam2's own predictor assumes 1024 px images and runs
prompt by prompt on the host. Prompts and masks are in original pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from cachetools import LRUCache
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from perception.types import MaskPrompt

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base

_hydra_in_use = GlobalHydra.instance().is_initialized()
_CONFIGS = files("sam2") / "configs"  # this imports sam2, which takes Hydra's global state where nobody has it
if not _hydra_in_use:
    GlobalHydra.instance().clear()  # the program's own Hydra needs it
OFFICIAL = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}
# build_sam2's default: where the single mask is unstable, the best of the three takes its place.
_DYNAMIC_MULTIMASK = {
    "dynamic_multimask_via_stability": True,
    "dynamic_multimask_stability_delta": 0.05,
    "dynamic_multimask_stability_thresh": 0.98,
}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_STABILITY_OFFSET = 1.0
_PROMPTS_PER_CALL = 128
_PIXELS_PER_CALL = 1 << 27
"""Full-size logits held at once (512 MiB in float32)."""


class Embedding(NamedTuple):
    """One encoded image."""

    maps: tuple[Tensor, ...]
    """Finest first, each (1, C_i, h_i, w_i); the last is the image embedding, the others high-resolution features."""
    height: int
    width: int
    """Original size in pixels."""


class Segmentation(NamedTuple):
    """The masks of several answers about one image; they stay on the device."""

    masks: Tensor
    """(S, H, W) bool at the original size: per answer, the union of its objects."""
    features: np.ndarray
    """(S, 3) float64, means over the answer's objects, 0 where it has none: SAM2's predicted IoU; stability (area at
    logit > 1 over area at logit > -1); agreement (IoU of the prompted box with the mask's own, 1 without a box)."""

    def overlaps(self, truth: np.ndarray) -> np.ndarray:
        """IoU and Dice with truth (H, W) bool, counted on the device: (S, 2) float64.

        Both empty is 1 (a rightly answered 'no target'), one empty is 0.
        """
        target = torch.from_numpy(truth).to(self.masks.device)
        counts = torch.stack([(self.masks & target).sum((1, 2)), self.masks.sum((1, 2)) + target.sum()])
        both, total = counts.cpu().numpy().astype(np.float64)
        some = np.maximum(total, 1)
        return np.where(total[:, None] == 0, 1.0, np.stack([both / np.maximum(total - both, 1), 2 * both / some], 1))

    def within(self, judged: np.ndarray) -> Segmentation:
        """The same masks, in the pixels of (H, W) bool alone."""
        return Segmentation(self.masks & torch.from_numpy(judged).to(self.masks.device), self.features)

    def mask(self, index: int) -> np.ndarray:
        """One answer's mask, (H, W) bool on the host."""
        return self.masks[index].cpu().numpy()


class Segmenter:
    """Holds a SAM2 model and the embeddings of the most recently used images."""

    def __init__(self, model: SAM2Base, device: str, dtype: torch.dtype = torch.float32, capacity: int = 64) -> None:
        self.model = model.to(device=device, dtype=dtype).eval()
        self.model.sam_prompt_encoder.float()  # coordinates do not survive bfloat16
        self.device, self.dtype = torch.device(device), dtype
        self._embeddings: LRUCache[str, Embedding] = LRUCache(capacity)
        self._mean = torch.tensor(_MEAN, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(_STD, device=device).view(1, 3, 1, 1)

    @classmethod
    def load(cls, path: str, device: str = "cpu", dtype: torch.dtype = torch.float32, capacity: int = 64) -> Segmenter:
        """From a directory (`config.yaml` + `model.safetensors`, or an official yaml + `.pt`) or `random:<hiera name>`.

        Raises FileNotFoundError or ValueError naming what is missing or wrong.
        """
        if path.startswith("random:"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return cls(build(official_config(path.removeprefix("random:"))), device, dtype, capacity)
        config, weights = model_files(Path(path))
        model = build(_read_config(config))
        model.load_state_dict(read_weights(weights))
        return cls(model, device, dtype, capacity)

    @property
    def side(self) -> int:
        """Side of the square the model sees, in pixels."""
        return int(self.model.image_size)

    # ------------------------------------------------------------ differentiable parts, for training

    def pixels(self, images: Sequence[np.ndarray]) -> Tensor:
        """RGB uint8 (H, W, 3) images of any size -> normalised (B, 3, side, side) on the device."""
        squares = []
        for image in images:
            tensor = torch.tensor(image, device=self.device).permute(2, 0, 1)[None].float() / 255
            squares.append(F.interpolate(tensor, (self.side, self.side), mode="bilinear", antialias=True))
        return ((torch.cat(squares) - self._mean) / self._std).to(self.dtype)

    def features(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Normalised (B, 3, side, side) -> feature maps, finest first, each (B, C_i, h_i, w_i)."""
        levels = self.model.forward_image(pixels)["backbone_fpn"][-self.model.num_feature_levels :]
        last = levels[-1]
        if self.model.directly_add_no_mem_embed:
            last = last + self.model.no_mem_embed.view(1, -1, 1, 1)
        return tuple(level.to(self.dtype) for level in (*levels[:-1], last))

    def predict(self, maps: Sequence[Tensor], coords: Tensor, labels: Tensor, multimask: bool) -> tuple[Tensor, Tensor]:
        """One mask decoder call.

        maps: of one image (batch 1), or of N images, one per prompt. coords (N, P, 2) in the model's square, labels
        (N, P) as SAM numbers them. Returns logits (N, M, h, w) and predicted IoUs (N, M); M is 3 or 1.
        """
        encoder = self.model.sam_prompt_encoder
        sparse, dense = encoder(points=(coords, labels), boxes=None, masks=None)
        image = {"image_embeddings": maps[-1], "image_pe": encoder.get_dense_pe().to(self.dtype)}
        asked = {"sparse_prompt_embeddings": sparse.to(self.dtype), "dense_prompt_embeddings": dense.to(self.dtype)}
        modes = {"multimask_output": multimask, "repeat_image": maps[-1].shape[0] == 1}
        logits, iou, _, _ = self.model.sam_mask_decoder(
            **image, **asked, **modes, high_res_features=list(maps[:-1]) or None
        )
        return logits, iou

    # ------------------------------------------------------------ inference

    @torch.no_grad()
    def encode(self, images: Sequence[np.ndarray]) -> list[Embedding]:
        """Encode RGB uint8 (H, W, 3) images of any sizes in one call."""
        maps = self.features(self.pixels(images))
        sizes = [image.shape[:2] for image in images]
        return [Embedding(tuple(level[i : i + 1] for level in maps), *size) for i, size in enumerate(sizes)]

    def embed(self, key: str, image: Callable[[], np.ndarray]) -> tuple[Embedding, bool]:
        """The embedding under this content key, and whether it was there already. `image` is called only when not."""
        cached = key in self._embeddings
        if not cached:
            self._embeddings[key] = self.encode([image()])[0]
        return self._embeddings[key], cached

    @torch.no_grad()
    def decode(
        self, embedding: Embedding, prompts: Sequence[MaskPrompt], multimask: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Decode N prompts of one image, in original pixels.

        Returns low-resolution mask logits (N, h, w) and predicted IoUs (N,), float32 on the device.
        With `multimask` the most confident of three masks is kept. Raises ValueError if a prompt has neither box nor
        point.
        """
        size = self.model.sam_prompt_encoder.mask_input_size
        logits = torch.empty(len(prompts), *size, device=self.device)
        iou = torch.empty(len(prompts), device=self.device)
        scale = np.array([self.side / embedding.width, self.side / embedding.height])
        for rows in _alike(prompts):
            coords = (np.array([_coordinates(prompts[i]) for i in rows], np.float64) * scale).astype(np.float32)
            labels = torch.tensor([_labels(prompts[i]) for i in rows], dtype=torch.int32, device=self.device)
            masks, scores = self.predict(embedding.maps, torch.from_numpy(coords).to(self.device), labels, multimask)
            each, best = torch.arange(len(rows), device=self.device), scores.argmax(1)
            where = torch.tensor(rows, device=self.device)
            logits[where], iou[where] = masks[each, best].float(), scores[each, best].float()
        return logits, iou

    def segment(
        self, image: Embedding, prompts: Sequence[MaskPrompt], owners: np.ndarray, answers: int, multimask: bool = False
    ) -> Segmentation:
        """Masks of `answers` answers about one image. Prompts as in `decode`, owners (N,) their answers."""
        logits, iou = self.decode(image, prompts, multimask)
        boxes = np.array([prompt.box or (np.nan,) * 4 for prompt in prompts], np.float64).reshape(-1, 4)
        measured = torch.stack([iou, _stability(logits), _agreement(logits, boxes, image)], 1).cpu().numpy()
        features = np.zeros((answers, 3))
        np.add.at(features, owners, measured)
        features /= np.maximum(np.bincount(owners, minlength=answers), 1)[:, None]
        return Segmentation(self._unions(logits, owners, answers, image), features)

    @torch.no_grad()
    def _unions(self, logits: Tensor, owners: np.ndarray, answers: int, embedding: Embedding) -> Tensor:
        size = (embedding.height, embedding.width)
        union = torch.zeros(answers, *size, dtype=torch.int16, device=self.device)
        if not len(logits):
            return union > 0
        owner = torch.from_numpy(owners).to(self.device)
        chunk = max(1, min(_PROMPTS_PER_CALL, _PIXELS_PER_CALL // (size[0] * size[1])))
        for part, who in zip(logits.split(chunk), owner.split(chunk), strict=True):
            full = F.interpolate(part[None], size, mode="bilinear", align_corners=False)[0]
            union.index_add_(0, who, (full > 0).to(torch.int16))
        return union > 0


def _alike(prompts: Sequence[MaskPrompt]) -> Iterator[list[int]]:
    """Indices of prompts that go through the decoder together: with and without a box, by number of points."""
    kinds: dict[tuple[bool, int], list[int]] = {}
    for index, prompt in enumerate(prompts):
        if prompt.box is None and not prompt.points:
            raise ValueError("a prompt needs a box or a point")
        kinds.setdefault((prompt.box is not None, len(prompt.points)), []).append(index)
    for rows in kinds.values():
        yield from (rows[start : start + _PROMPTS_PER_CALL] for start in range(0, len(rows), _PROMPTS_PER_CALL))


def _coordinates(prompt: MaskPrompt) -> list[tuple[float, float]]:
    """The box's two corners, then the points."""
    return [*((prompt.box[:2], prompt.box[2:]) if prompt.box else ()), *prompt.points]


def _labels(prompt: MaskPrompt) -> list[int]:
    """SAM's: 2 and 3 the box's corners, 1 foreground, 0 background."""
    return [*((2, 3) if prompt.box else ()), *(prompt.labels or (1,) * len(prompt.points))]


def _stability(logits: Tensor) -> Tensor:
    """(N, h, w) -> (N,): how little the mask's area depends on where its logits are cut (SAM's stability score)."""
    sure, possible = (logits > _STABILITY_OFFSET).sum((1, 2)), (logits > -_STABILITY_OFFSET).sum((1, 2))
    return sure / possible.clamp(min=1)


def _agreement(logits: Tensor, boxes: np.ndarray, embedding: Embedding) -> Tensor:
    """(N, h, w) and boxes (N, 4) in original pixels -> (N,): IoU of each box with its mask's own; 1 without a box."""
    rows, columns = (logits > 0).any(2), (logits > 0).any(1)
    height, width = logits.shape[1:]
    scale = torch.tensor([embedding.width / width, embedding.height / height], device=logits.device)
    low = torch.stack([columns.int().argmax(1), rows.int().argmax(1)], 1) * scale
    last = torch.stack([width - columns.flip(1).int().argmax(1), height - rows.flip(1).int().argmax(1)], 1)
    high = torch.where(rows.any(1)[:, None], last * scale, low)
    asked = torch.from_numpy(boxes).to(logits)
    both = (torch.minimum(high, asked[:, 2:]) - torch.maximum(low, asked[:, :2])).clamp(min=0).prod(1)
    either = (high - low).prod(1) + (asked[:, 2:] - asked[:, :2]).prod(1) - both
    return torch.where(asked.isnan().any(1), torch.ones_like(both), both / either.clamp(min=1e-6))


def official_config(name: str) -> DictConfig:
    """sam2's own SAM 2.1 configuration: tiny, small, base_plus or large."""
    if name not in OFFICIAL:
        raise ValueError(f"no SAM2 named '{name}'; known: {', '.join(OFFICIAL)}")
    return _read_config(_official("sam2.1", name))


def _official(version: str, size: str) -> Traversable:
    return _CONFIGS / version / f"{version}_hiera_{OFFICIAL[size]}.yaml"


def build(config: DictConfig) -> SAM2Base:
    """Instantiate the `model:` node of a SAM2 configuration. Raises ValueError if it names code outside sam2."""
    node = config.model
    foreign = [target for target in _targets(OmegaConf.to_container(node)) if not target.startswith("sam2.")]
    if foreign:
        raise ValueError(f"a SAM2 configuration may only name sam2's classes, not {foreign[0]}")
    if "sam_mask_decoder_extra_args" not in node:
        node.sam_mask_decoder_extra_args = _DYNAMIC_MULTIMASK
    return instantiate(node, _recursive_=True)


def _read_config(path: Traversable) -> DictConfig:
    config = OmegaConf.create(path.read_text())
    if not isinstance(config, DictConfig) or "model" not in config:
        raise ValueError(f"{path} holds no `model:` node")
    return config


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict) and "_target_" in node:
        yield node["_target_"]
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _targets(value)


def model_files(folder: Path) -> tuple[Traversable, Path]:
    """Configuration and weights in a SAM2 directory. Meta's weights come before those it releases beside them for
    transformers, and name their configuration where none is there. Raises FileNotFoundError."""
    weights = next((file for kind in ("*.pt", "*.safetensors") for file in sorted(folder.glob(kind))), Path())
    version, _, size = weights.stem.partition("_hiera_")
    if (own := sorted(folder.glob("*.yaml"))) and weights.name:
        return own[0], weights
    if version not in ("sam2", "sam2.1") or size not in OFFICIAL:
        raise FileNotFoundError(f"segmenter '{folder}' needs *.yaml and *.safetensors, or *.yaml and *.pt")
    return _official(version, size), weights


def read_weights(file: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Raises ValueError for a `.pt` that is none of SAM2's, or that runs code when it is read."""
    if file.suffix == ".safetensors":
        return load_file(file, device)
    try:
        return dict(torch.load(file, map_location=device, weights_only=True)["model"])
    except (RuntimeError, UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no weights of SAM2 ({type(error).__name__})") from error
