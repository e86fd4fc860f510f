"""Model families by `model_type`: facts for rollout and launch. Those for the learner are in `learner/families/`.

A model type that nothing is registered for is an ordinary image-text model, `Family()`. A module of yours may add one:

    register("my_model_type")(Family(frame="thousand", images_alone=False))
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from perception.config import AnswerFrame
from perception.registry import Registry

_SHORTENED_TOWERS = ("clip_vision_model", "siglip_vision_model")
_LONG_TOWER = (("model.vision_tower.", "model.vision_tower.vision_model."),)
"""transformers 5 leaves a level out of these towers' names that released files and vLLM have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    frame: AnswerFrame = "thousand"
    """The frame that its released models answer in; `model.answer_frame` wins."""
    native: bool = False
    """Images are resized to multiples of the image processor's patch_size * merge_size, and each such square becomes
    one token (transformers' `smart_resize`). Only then is `resized` a frame."""
    images_alone: bool = True
    """An image becomes the same tokens whatever other images its prompt has."""
    renames: tuple[tuple[str, str], ...] = ()
    """Beginnings of parameter names: as transformers has them -> as vLLM loads them."""
    unfit: Mapping[str, str] = field(default_factory=dict)
    """Device, or device and dtype -> why its engine cannot be used."""


FAMILIES: Registry[Family] = Registry("model family")
register = FAMILIES.register

register("qwen2_vl")(Family(native=True))
register("qwen2_5_vl")(Family(native=True, frame="resized"))
register("qwen3_vl")(Family(native=True))
register("llava_onevision")(Family(images_alone=False))
for ordinary in ("internvl", "idefics3", "smolvlm", "llava", "llava_next", "mistral3"):
    register(ordinary)(Family())
register("gemma3")(Family(unfit={"cpu": "vLLM's CPU attention is causal among an image's tokens, the model's is not"}))
_HALF = "vLLM computes linear attention in bfloat16 alone there; take model.dtype=bfloat16"
register("qwen3_5")(Family(native=True, unfit={"cpu float32": _HALF}))


def family_of(model_type: str) -> Family:
    return FAMILIES[model_type] if model_type in FAMILIES else Family()


def engine_renames(model_type: str, tower: str | None) -> tuple[tuple[str, str], ...]:
    """`PolicySpec.renames` of a model whose config.json has these `model_type` and `vision_config.model_type`."""
    return family_of(model_type).renames + (_LONG_TOWER if tower in _SHORTENED_TOWERS else ())


def engine_name(name: str, renames: Iterable[tuple[str, str]]) -> str:
    """The name vLLM loads a parameter of transformers' name by."""
    for old, new in renames:
        if name.startswith(old) and not name.startswith(new):
            return new + name.removeprefix(old)
    return name
