"""Export: the policy in Hugging Face format, and LoRA's adapters, where it has any, in peft's."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from learner.policy import Policy, adapters
from perception.config import LoraConfig
from perception.errors import UserError
from perception.frames import PIXEL_LIMITS

COPIED = (".json", ".jinja", ".txt", ".model")
WRITTEN = ("config.json", "model.safetensors.index.json")
"""Files of these kinds that are not copied: they go with the weights."""
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def export(
    policy: Policy, weights: dict[str, Tensor], folder: Path, lora: LoraConfig, adapted: Mapping[str, Tensor]
) -> None:
    """Write `weights` (by `named_parameters()` name) to `folder`, with the files that training does not change as they
    are at the policy's source, and `adapted`, by peft's names, to `adapter/` there: for the weights the run started
    from. Limits of an image's size that the run has set are set there, too.

    The result loads in transformers and vLLM. Not collective: rank 0 calls it.
    """
    spec, model = policy.family.spec, policy.model
    model.generation_config = GenerationConfig()  # transformers does not write every one that it reads
    model.save_pretrained(folder, state_dict=weights)
    (folder / "generation_config.json").unlink()
    for file in Path(spec.path).iterdir():
        if file.suffix in COPIED and file.name not in WRITTEN:
            shutil.copyfile(file, folder / file.name)
            if spec.pixels and file.name in PROCESSOR_FILES:
                limit_pixels(folder / file.name, spec.pixels)
    if adapted:
        settings = adapters(lora, policy.family)
        settings.base_model_name_or_path = spec.path
        settings.save_pretrained(str(folder / "adapter"))
        save_file(dict(adapted), folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})


def limit_pixels(file: Path, pixels: tuple[int, int]) -> None:
    """Write the fewest and the most pixels of a resized image into an image processor's file, in place of others."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    images = settings.get("image_processor", settings)  # since transformers 5 one file has several processors
    images["size"] = dict(zip(PIXEL_LIMITS, pixels, strict=True))
    for older in ("min_pixels", "max_pixels"):
        images.pop(older, None)
    file.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def try_export(policy: Policy) -> None:
    """Write all but the weights, and drop it: what cannot be exported is not worth training. Raises UserError."""
    try:
        with TemporaryDirectory() as folder:
            export(policy, {}, Path(folder), LoraConfig(), {})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"model.path={policy.family.spec.path}: what is trained could not be saved: {why}") from error
