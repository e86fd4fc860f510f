"""Settings of what goes in: the models, the data, the prompt words of each task."""

from dataclasses import dataclass, field
from typing import Any, Literal

from perception.config.fields import AnswerFrame, Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    path: str
    """The policy, in Hugging Face format (config, safetensors, tokenizer, image processor): a directory, also that of
    a hub cache, or a hub id, as `Qwen/Qwen2.5-VL-3B-Instruct` or with `@revision`."""
    min_pixels: Positive | None = None
    max_pixels: Positive | None = None
    """An image is resized to have at least and at most so many pixels, wherever the policy sees it, in training,
    evaluation and the exported files. None: as its image processor says. Only Qwen-VL's families can be told."""
    segmenter: str
    """SAM2, named in the same ways: a yaml with `model.safetensors` or, of any released size of SAM 2 and 2.1, with
    Meta's `.pt`; or `random:<hiera name>` for random weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the policy's weights, in engine and learner."""
    shape: str | None = None
    """If `path` is missing, random weights of this shape (`conf/shape/`) are written there."""
    answer_frame: AnswerFrame | None = None
    """The policy answers in pixels of the resized image (Qwen2.5-VL) or 0..1000 (Qwen3-VL). None: its family's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    format: str
    """A registered reader's name (`perception.datasets`), as jsonl, coco or ref_coco."""
    options: dict[str, Any] = field(default_factory=dict)
    """The reader's own options; checked against its signature."""
    train: str = ""
    """The training annotations: a file or folder in the reader's layout, or a hub id where it reads tables. Evaluation
    needs none."""
    eval: str
    """The held-out annotations, same format; a run is judged by them."""
    also: dict[str, str] = field(default_factory=dict)
    """Further held-out sets, evaluated with the first one: name -> path of the annotations."""
    eval_options: dict[str, Any] = field(default_factory=dict)
    """What differs of `options` for all held-out sets, as {split: val}."""
    images: str | None = None
    """Folder of the pictures. None: beside the annotations, or in `images/` there."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """What a record does that cannot be used: end the run with its message, or be left out and counted."""
    eval_samples: Positive = 128
    """The first so many samples of each held-out set, always the same."""
    world_side: Positive | None = None
    world_train: Positive = 4096
    """If `train` is missing, the synthetic world is written there: side of its images, training scenes."""
    refuse_pixels: Positive = 50_000_000
    """An image of more pixels is refused, before it is decoded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    form: str | None = None
    """Registered task (`perception.tasks`) that reads the answers; None: the one of the same name."""
    system: str | None
    """System turn; null: none. Where the chat format has no place for one, it opens the user's turn."""
    template: str
    """User turn; `{question}` is replaced. The image placeholder is put before it."""
    inline: str
    """The same under `look=inline`: it asks for `<look>` inside the thinking."""
    again: str
    """User turn of every later pass under `look=relook`, after the closer view's image."""
