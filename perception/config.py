"""The typed settings of every room: what `conf/` is validated against (`launch/config.py`).

Frozen dataclasses, so that a worker can be handed exactly the part it needs. Bounds stand beside the type and are
enforced by pydantic when the program starts; an unknown key, an ill-typed or out-of-range value never reaches a
worker.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

Positive = Annotated[int, Gt(0)]
Natural = Annotated[int, Ge(0)]
Rate = Annotated[float, Gt(0.0)]
NonNegative = Annotated[float, Ge(0.0)]
Fraction = Annotated[float, Ge(0.0), Le(1.0)]
LookMode = Literal["none", "inline", "relook"]
AnswerFrame = Literal["resized", "thousand"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    path: str
    """Policy directory in Hugging Face format (config, safetensors, tokenizer, image processor)."""
    segmenter: str
    """SAM2 directory: `config.yaml` + `model.safetensors`, or `random:<hiera name>` for random weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    shape: str | None = None
    """If `path` is missing, random weights of this shape (`launch.policies.SHAPES`) are written there."""
    answer_frame: AnswerFrame | None = None
    """Frame the policy answers in: pixels of the resized image (Qwen2.5-VL) or 0..1000 (Qwen3-VL); None: its family's
    (`perception.families`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    format: str
    """Registered reader: coco, jsonl."""
    train: str
    """Path of the training annotations (JSON for coco, JSONL for jsonl)."""
    eval: str
    """Path of the held-out annotations, same format."""
    options: dict[str, Any] = field(default_factory=dict)
    """The reader's own options; checked against its signature."""
    also: dict[str, str] = field(default_factory=dict)
    """Further held-out sets, evaluated with the first one: name -> path of the annotations."""
    eval_samples: Positive = 128
    """The first so many samples of each held-out set, always the same."""
    world_side: Positive | None = None
    """If `train` is missing, the synthetic world (`launch.world`) is written beside it, with images of this side."""
    world_train: Positive = 4096
    """How many training scenes are then written."""
    max_pixels: Positive = 50_000_000
    """A larger image is refused before anything starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """How one task is put to the policy."""

    form: str | None = None
    """Registered task (`perception.tasks`) that reads and writes the answers; None: the one of the same name."""
    system: str
    template: str
    """User turn; `{question}` is replaced. The image placeholder is put before it."""
    inline: str
    """The same under `look=inline`: it asks for `<look>` inside the thinking."""
    again: str
    """User turn of every later pass under `look=relook`, after the closer view's image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LookConfig:
    """Look-to-Confirm: `inline` is Dr. Seg's single pass, `relook` looks again where an answer is unsure."""

    mode: LookMode = "none"
    trigger: Literal["confidence", "always", "never"] = "confidence"
    """When to look again: below the learned threshold, whenever there is something to enlarge, or never."""
    max_passes: Annotated[int, Ge(2)] = 2
    margin: NonNegative = 0.5
    """Around what was answered, in longer sides of it."""
    smallest: Annotated[float, Gt(0.0), Le(1.0)] = 0.25
    """Side of the smallest view, as a share of the image's shorter side."""
    min_zoom: Annotated[float, Ge(1.0)] = 1.3
    """A view enlarged by less than this is not worth a pass."""
    pixels: Positive = 12544
    """Pixels of a view's picture."""
    cost: NonNegative = 0.01
    """Mask IoU that a further pass must gain to be worth its time."""
    explore: Fraction = 0.1
    """While training: share of the confident answers looked at again all the same, to measure what that gains."""
    calibration: Natural = 64
    """Training prompts answered before the first step, to learn when to look again; 0: learn only while training."""
    window: Positive = 4096
    """Judged answers the calibration is fitted to, the newest ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EcdfConfig:
    """Distribution-Ranked Reward (Dr. Seg): a metric's quantile among recent ones (`reward_workers/ranking.py`)."""

    capacity: Positive = 2048
    initial_zero_rows: Natural = 0
    ties: Literal["le", "mid"] = "mid"
    digits: Natural | None = None
    """Round each rank to so many decimals; None: no rounding."""
    aggregate: Literal["sum", "mean"] = "sum"
    warmup: Natural = 1
    """Steps that must have been seen before ranks are used; raw values serve until then."""
    exclude_unparsed: bool = True
    per_task: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRankConfig:
    """Soft rank among all candidate masks of a prompt, every pass of every sample (`reward_workers/group_rank.py`)."""

    by: Literal["iou", "dice", "ap"] = "iou"
    temperature: Rate = 0.1
    """Difference of the metric that counts as clearly better; towards 0 the rank becomes a hard one."""


Weights = dict[str, float | dict[str, Any]]
"""Component name -> weight, or {weight: ..., parameters of the component}."""


def weights(chosen: Weights) -> dict[str, float]:
    """Component name -> weight, without parameters."""
    return {name: given["weight"] if isinstance(given, dict) else given for name, given in chosen.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    name: str
    components: Weights
    """Added to the reward as they are."""
    ranked: Weights = field(default_factory=dict)
    """Components that `rank` is about."""
    rank: Literal["none", "ecdf", "group"] = "none"
    """none: `ranked` is added raw. ecdf: as quantiles of recent rollouts. group: one soft rank of the masks takes its
    place, with the sum of its weights."""
    ecdf: EcdfConfig = field(default_factory=EcdfConfig)
    group: GroupRankConfig = field(default_factory=GroupRankConfig)
    unparsed_reward: float | None = 0.0
    """Reward of a failed trajectory; null lets its components stand (the published systems' rule)."""
    multimask: bool = False
    """SAM2 proposes three masks and the most confident one is kept."""
    workers: Positive = 1
    image_cache: Positive = 64
    """SAM2 embeddings kept per worker."""
    timeout_s: Rate = 120.0
    """Longest wait for a group's score."""
    max_failure_rate: Fraction = 0.5
    """Engine or scorer failures above this share of a step stop the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmConfig:
    """The objective (`learner/loss.py`), the advantages (`learner/advantages.py`), and how a batch becomes steps."""

    steps: Positive
    prompts_per_step: Positive
    group_size: Annotated[int, Ge(2)]
    loss: str = "ppo"
    """Registered surrogate (`learner/loss.py`): ppo, clipped token ratio (GRPO, DAPO, Dr. GRPO); gspo, clipped sequence
    ratio; cispo, clipped detached weight."""
    aggregate: Literal["token", "sequence", "constant"] = "token"
    """Mean over all tokens (DAPO), mean over trajectories of their token means (GRPO as published), or sum over
    trajectories x `rollout.max_new_tokens` (Dr. GRPO)."""
    clip_low: Rate = 0.2
    clip_high: Rate = 0.2
    scale: Literal["group", "batch", "none"] = "group"
    """Advantages over the standard deviation of the group, of the whole step's rewards, or as they are (Dr. GRPO)."""
    kl_coef: NonNegative = 0.0
    """KL to the starting policy. 0 keeps no reference model."""
    kl: Literal["k1", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    entropy_coef: NonNegative = 0.0
    """Bonus on the entropy, in the loss."""
    importance: Literal["none", "token", "sequence"] = "token"
    """Truncated weight learner / engine for what separates the two; none: the engine's log-probs are the old policy."""
    importance_cap: Rate = 2.0
    dynamic: Literal["none", "drop", "refill"] = "none"
    """Groups whose rewards are all equal: kept, left out, or replaced by further prompts (DAPO)."""
    dynamic_rounds: Positive = 4
    """With refill: how often at most a step samples."""
    updates: Positive = 1
    """Optimizer steps over a batch: it is cut into so many mini-batches."""
    epochs: Positive = 1
    """Passes over a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the language model's linear layers (peft); the engine gets the merged weights."""

    rank: Natural = 0
    """0: no adapters, every weight that is not frozen is trained."""
    alpha: Positive = 32
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    ranks: Positive = 1
    zero_stage: Literal[1, 2, 3] = 2
    offload_optimizer: bool = False
    """Optimizer states and their step in host memory (ZeRO-Offload)."""
    lr: Rate = 1e-6
    warmup_steps: Natural = 0
    """Optimizer steps."""
    schedule: Literal["constant", "linear"] = "constant"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: NonNegative = 0.0
    grad_clip: Rate = 1.0
    rows: Literal["packed", "padded"] = "packed"
    """packed: a group is one row with its prompt once. padded: one row per trajectory; also what a model family that
    packing does not know gets."""
    micro_tokens: Positive = 16384
    """Tokens of a micro-batch, per rank; a group that is longer is cut between its trajectories."""
    checkpointing: Literal["off", "selective", "on"] = "off"
    """Layers whose activations are recomputed in the backward pass: none, every other one, all."""
    compile: bool = False
    """torch.compile of text layers, vision blocks and vocabulary head (CUDA)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    freeze_vision: bool = False
    """The vision tower is not trained; its features are then kept by image across steps."""
    feature_cache_mb: Natural = 1024
    """Host memory for the features of a frozen vision tower."""
    bucket_mb: Positive = 256
    """Size of a weight-sync bucket."""
    checksum: bool = False
    """After each sync, prove that every parameter landed in the engine."""
    parity_limit: Rate = 0.02
    """Mean |log-prob difference| engine vs learner beyond which the run refuses to start."""
    timeout_s: Rate = 1800.0
    """Longest wait for one call to the learner, and for one collective among its ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    engines: Positive = 1
    temperature: Annotated[float, Gt(0.0), Le(2.0)] = 1.0
    max_new_tokens: Positive = 256
    max_model_len: Positive = 4096
    max_num_seqs: Positive = 64
    max_images: Positive = 2
    block_size: Positive = 32
    kv_cache_mb: Natural = 0
    """KV cache in MiB; 0: vLLM's own share of the GPU (`gpu_memory`)."""
    gpu_memory: Fraction = 0.3
    """Share of the GPU's memory vLLM may take."""
    enforce_eager: bool = True
    start_timeout_s: Rate = 600.0
    request_timeout_s: Rate = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineConfig:
    """Rollouts and learning, one after the other or side by side (`launch/run/pipeline.py`)."""

    max_staleness: Natural = 0
    """How many steps rollouts may be behind the weights they are learned with; 0: the synchronous loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementConfig:
    """Who sits where. Fractions of CPUs and GPUs each actor claims from Ray."""

    name: str
    device: Literal["cpu", "cuda"]
    engine_cpus: NonNegative = 1.0
    engine_gpus: NonNegative = 0.0
    reward_cpus: NonNegative = 1.0
    reward_gpus: NonNegative = 0.0
    learner_cpus: NonNegative = 1.0
    learner_gpus: NonNegative = 0.0
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    transport: Literal["store", "ipc", "nccl", "gloo"] = "store"
    """Weights by Ray's object store (shared memory on a node), by CUDA IPC (engine and learner on one GPU), or
    broadcast by learner rank 0 to every engine: nccl between GPUs, gloo between hosts."""
    threads: Natural = 0
    """Intra-op threads of each worker process; 0: the library's default."""
    start_timeout_s: Rate = 300.0
    """How long to wait for the cluster to grant the placement, and for a reward worker to be ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WandbConfig:
    project: str = "relook"
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online when the user is logged in, else offline; never asks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    name: str
    output: str = "runs"
    """Where `<output>/<name>/` is made. On a cluster: a path every node's driver can reach."""
    seed: int = 42
    resume: str | None = None
    """A run's name or directory to go on from."""
    deterministic: bool = False
    """Bit-exact on the CPU: sequences are sampled one at a time, and torch uses deterministic algorithms only."""
    eval_every: Natural = 0
    """Steps between held-out evaluations; 0: only before and after."""
    checkpoint_every: Natural = 50
    rollouts_kept: Natural = 16
    """Groups per step written to rollouts parquet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One run, whole."""

    resume: str | None = None
    """Short for `run.resume`, which takes its value from here."""
    run: RunConfig
    model: ModelConfig
    data: DataConfig
    task: dict[str, TaskConfig]
    """By task name, as samples carry it: segment, ground, count."""
    look: LookConfig
    reward: RewardConfig
    algorithm: AlgorithmConfig
    learner: LearnerConfig
    rollout: RolloutConfig
    placement: PlacementConfig
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    plugins: tuple[str, ...] = ()
    """Importable modules or paths (a package folder or a .py file) with your own tasks, components, readers, surrogates
    and families; loaded in every worker process."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
