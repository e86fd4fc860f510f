"""The policy's processor, one and the same where prompts are made and in the learner."""

from typing import Any

from transformers import AutoProcessor

from perception.frames import PIXEL_LIMITS


def load_processor(path: str, pixels: tuple[int | None, int | None] | None = None) -> Any:
    """`pixels`: the fewest and the most of a resized image, where they are not the processor's own.

    Raises what transformers raises for a directory that it cannot read.
    """
    # The torchvision backend is vLLM's: resized pixels then agree to the last bit.
    processor = AutoProcessor.from_pretrained(path, backend="torchvision", local_files_only=True)
    for name, limit in zip(PIXEL_LIMITS, pixels or (None, None), strict=True):
        if limit is not None:
            processor.image_processor.size[name] = limit
    return processor
