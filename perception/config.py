"""Typed settings: the one place of every default and of the sentence that explains it (`make docs` lists them).

`conf/` holds only what differs. Pydantic enforces the bounds at the start. A sentence explains the fields above it.
"""

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
    train: str
    """The training annotations: a file or folder in the reader's layout, or a hub id where it reads tables."""
    eval: str
    """The held-out annotations, same format; a run is judged by them."""
    also: dict[str, str] = field(default_factory=dict)
    """Further held-out sets, evaluated with the first one: name -> path of the annotations."""
    images: str | None = None
    """Folder of the pictures. None: beside the annotations, or in `images/` there."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """What a record does that cannot be used: end the run with its message, or be left out and counted."""
    eval_samples: Positive = 128
    """The first so many samples of each held-out set, always the same."""
    world_side: Positive | None = None
    world_train: Positive = 4096
    """If `train` is missing, the synthetic world is written there: side of its images, training scenes."""
    max_pixels: Positive = 50_000_000
    """A larger image is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    form: str | None = None
    """Registered task (`perception.tasks`) that reads and writes the answers; None: the one of the same name."""
    system: str
    """System turn."""
    template: str
    """User turn; `{question}` is replaced. The image placeholder is put before it."""
    inline: str
    """The same under `look=inline`: it asks for `<look>` inside the thinking."""
    again: str
    """User turn of every later pass under `look=relook`, after the closer view's image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LookConfig:
    mode: LookMode = "none"
    """none: one pass. inline: Dr. Seg's single pass with `<look>` blocks. relook: again where an answer is unsure."""
    trigger: Literal["confidence", "always", "never"] = "confidence"
    """When relook looks again: below the learned threshold, whenever there is something to enlarge, or never."""
    max_passes: Annotated[int, Ge(2)] = 2
    """Passes of a trajectory, the first one included."""
    margin: NonNegative = 0.5
    """What a view shows around the answer, in longer sides of it."""
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
    capacity: Positive = 2048
    initial_zero_rows: Natural = 0
    """Rollouts a queue holds, the newest ones, and rows of zeros it starts with."""
    ties: Literal["le", "mid"] = "mid"
    """A rank is the share of lower and equal values (le), or equal ones count half (mid)."""
    digits: Natural | None = None
    """Round each rank to so many decimals; None: no rounding."""
    aggregate: Literal["sum", "mean"] = "sum"
    """Sum or mean of the components' weighted ranks."""
    warmup: Natural = 1
    """Steps that must have been seen before ranks are used; raw values serve until then."""
    exclude_unparsed: bool = True
    """An answer that does not parse does not enter the queue."""
    per_task: bool = True
    """A queue per task, or one for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRankConfig:
    by: Literal["iou", "dice", "ap"] = "iou"
    """Metric of the masks that are compared."""
    temperature: Rate = 0.1
    """Difference of the metric that counts as clearly better; towards 0 the rank becomes a hard one."""


Weights = dict[str, float | dict[str, Any]]  # component name -> weight, or {weight: ..., parameters of the component}


def weights(chosen: Weights) -> dict[str, float]:
    """Component name -> weight, without parameters."""
    return {name: given["weight"] if isinstance(given, dict) else given for name, given in chosen.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    name: str
    """The preset's name in messages."""
    components: Weights
    """Added to the reward as they are: component name -> weight, or {weight: 0.3, alpha: 0.5} with its parameters."""
    ranked: Weights = field(default_factory=dict)
    """Components that `rank` is about, written the same way."""
    rank: Literal["none", "ecdf", "group"] = "none"
    """`ranked` is added raw, as quantiles of recent rollouts, or replaced by one soft rank of the masks (group)."""
    ecdf: EcdfConfig = EcdfConfig()
    """Distribution-Ranked Reward (Dr. Seg): a metric's quantile among recent ones (`reward_workers/ranking.py`)."""
    group: GroupRankConfig = GroupRankConfig()
    """Soft rank among all candidate masks of a prompt, of every pass and sample (`reward_workers/group_rank.py`)."""
    unparsed_reward: float | None = 0.0
    """Reward of a failed trajectory; null lets its components stand (the published systems' rule)."""
    multimask: bool = False
    """SAM2 proposes three masks and the most confident one is kept."""
    workers: Positive = 1
    image_cache: Positive = 64
    """Reward workers, each with its own SAM2, and the image embeddings each of them keeps."""
    mask_cache: Natural = 512
    """Answers that look=relook has examined whose masks a worker keeps until they are scored; 0: decoded again."""
    timeout_s: Rate = 120.0
    """Longest wait for a group's score."""
    max_failure_rate: Fraction = 0.5
    """Engine or scorer failures above this share of a step stop the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmConfig:
    steps: Positive
    prompts_per_step: Positive
    group_size: Annotated[int, Ge(2)]
    """Steps of the run, prompts of a step, and answers sampled for each prompt."""
    loss: str = "ppo"
    """A registered surrogate's name. ppo: clipped token ratio; gspo: clipped sequence ratio; cispo: clipped weight."""
    aggregate: Literal["token", "sequence", "constant"] = "token"
    """Mean over all tokens (DAPO), mean over trajectories of their token means (GRPO as published), or sum over
    trajectories x `rollout.max_new_tokens` (Dr. GRPO)."""
    clip_low: Rate = 0.2
    clip_high: Rate = 0.2
    """The ratio is clipped to 1 - clip_low .. 1 + clip_high."""
    scale: Literal["group", "batch", "none"] = "group"
    """Advantages over the standard deviation of the group, of the whole step's rewards, or as they are (Dr. GRPO)."""
    kl_coef: NonNegative = 0.0
    """Weight of the KL to the starting policy. 0 keeps no reference model."""
    kl: Literal["k1", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    """Estimator of that KL, and where it is put."""
    entropy_coef: NonNegative = 0.0
    """Bonus on the entropy, in the loss."""
    importance: Literal["none", "token", "sequence"] = "token"
    importance_cap: Rate = 2.0
    """Truncated importance weight, learner over engine probability; none: the engine's log-probs are the old policy."""
    dynamic: Literal["none", "drop", "refill"] = "none"
    """Groups whose rewards are all equal: kept, left out, or replaced by further prompts (DAPO)."""
    dynamic_rounds: Positive = 4
    """With refill: how often at most a step samples."""
    updates: Positive = 1
    epochs: Positive = 1
    """Mini-batches a batch is cut into, one optimizer step each, and passes over the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    rank: Natural = 0
    """0: no adapters, every weight that is not frozen is trained."""
    alpha: Positive = 32
    """The adapters' product is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers that get one, by the last part of their name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    ranks: Positive = 1
    zero_stage: Literal[1, 2, 3] = 1
    """Data-parallel processes; DeepSpeed shards optimizer states (1), gradients too (2), weights too (3) among them;
    1 reduces gradients once a step, 2 and 3, for memory, after every micro-batch."""
    offload_optimizer: bool = False
    """Optimizer states and their step in host memory (ZeRO-Offload); gradients are then sharded in stage 1, too."""
    lr: Rate = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: NonNegative = 0.0
    """AdamW: learning rate, decay rates of its two moments, decoupled weight decay."""
    warmup_steps: Natural = 0
    schedule: Literal["constant", "linear"] = "constant"
    """Optimizer steps over which the rate rises from 0; then it stays, or falls to 0 at the end of the run."""
    grad_clip: Rate = 1.0
    """Largest norm of a step's gradient."""
    rows: Literal["packed", "padded"] = "packed"
    """A group is one row, its prompt once; or one row per trajectory, also for families that packing does not know."""
    micro_tokens: Positive = 16384
    """Tokens of a micro-batch, per rank; a group that is longer is cut between its trajectories."""
    checkpointing: Literal["off", "selective", "on"] = "off"
    """Layers whose activations are recomputed in the backward pass: none, every other one, all."""
    compile: bool = False
    """torch.compile of text layers, vision blocks and vocabulary head (CUDA)."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters on the language model's linear layers (peft); the engine gets the merged weights."""
    freeze_vision: bool = False
    feature_cache_mb: Natural = 1024
    """The vision tower is not trained; its features are then kept by image across steps, in so much host memory."""
    bucket_mb: Positive = 256
    """Size of a weight-sync bucket (MiB)."""
    checksum: bool = False
    """After each sync, prove that every parameter landed in the engine."""
    parity_limit: Rate | None = None
    """Mean |log-prob difference| engine vs learner beyond which the run refuses to start. None: 0.02 in float32, 0.05
    in bfloat16, 0.2 where the engine computes in fp8."""
    timeout_s: Rate = 1800.0
    """Longest wait for one call to the learner, and for one collective among its ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    engines: Positive = 1
    tensor_parallel: Positive = 1
    """vLLM engines, each with a copy of the policy, and the workers that share it; each claims `placement.engine_*`."""
    temperature: Annotated[float, Gt(0.0), Le(2.0)] = 1.0
    """Sampling temperature, in training and for the sampled held-out answers."""
    max_new_tokens: Positive = 256
    max_model_len: Positive = 4096
    """Tokens of one answer, and of a whole trajectory: prompts, images and answers."""
    max_num_seqs: Natural = 0
    max_batched_tokens: Natural = 0
    """Sequences an engine decodes at a time and tokens, also of images, it computes in a step. 0: 256 and 8192 where
    it has its GPU to itself, else 64 and vLLM's choice."""
    max_images: Positive = 2
    """Images of a trajectory; look=relook shows one a pass."""
    block_size: Positive = 32
    """Tokens of a KV cache block; whole blocks are shared by equal prefixes."""
    kv_cache_mb: Natural = 0
    gpu_memory: Fraction = 0.0
    """KV cache of a worker in MiB. 0: what is left of `gpu_memory`, its share of the GPU, from which vLLM deducts also
    what others take there while it starts; 0: 0.9 where it has its GPU to itself, else 0.3."""
    enforce_eager: bool | None = None
    """No CUDA graphs: a faster start, slower sampling. None: only where it has no GPU to itself."""
    quantization: Literal["fp8"] | None = None
    """Linear layers of the language model in fp8, weights by channel and activations by token."""
    start_timeout_s: Rate = 600.0
    request_timeout_s: Rate = 600.0
    """Longest wait for an engine to be ready, and for one request's answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineConfig:
    max_staleness: Natural = 0
    """How many steps rollouts may be behind the weights they are learned with; 0: the synchronous loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementConfig:
    name: str
    """The placement's name in messages."""
    device: Literal["cpu", "cuda"]
    """What engine, segmenter and learner compute on."""
    engine_cpus: NonNegative = 1.0
    engine_gpus: NonNegative = 0.0
    reward_cpus: NonNegative = 1.0
    reward_gpus: NonNegative = 0.0
    learner_cpus: NonNegative = 1.0
    learner_gpus: NonNegative = 0.0
    """CPUs and GPUs that each engine, reward worker and learner rank claims from Ray; fractions share one."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray's placement strategy, over the nodes of a cluster."""
    transport: Literal["store", "ipc", "nccl", "gloo"] = "store"
    """Weights by Ray's object store (shared memory on a node), by CUDA IPC (engine i, learner rank i and a share of the
    reward workers on GPU i), or broadcast by learner rank 0 to every engine: nccl between GPUs, gloo between hosts."""
    sleep: bool = False
    """With ipc: engines leave the GPU while the learner works, and the learner's states while they sample."""
    threads: Natural = 0
    """Intra-op threads of each worker process; 0: on CUDA the cores of its node, shared with the other workers there;
    on the CPU those it claims."""
    start_timeout_s: Rate = 300.0
    """How long to wait for the cluster to grant the placement, and for a reward worker to be ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WandbConfig:
    project: str = "relook"
    """W&B project the run belongs to."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online when the user is logged in, else offline; never asks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    name: str = "run"
    output: str = "runs"
    """The run's directory is `<output>/<name>/`. On a cluster: an absolute path that every node shares."""
    seed: int = 42
    """Seed of data order, sampling and everything else that is drawn."""
    resume: str | None = None
    """A run's name or directory: go on from its newest checkpoint."""
    deterministic: bool = False
    """Bit-exact on the CPU: sequences are sampled one at a time, and torch uses deterministic algorithms only."""
    eval_every: Natural = 0
    """Steps between held-out evaluations; 0: only before and after."""
    checkpoint_every: Natural = 50
    """Steps between checkpoints."""
    rollouts_kept: Natural = 16
    """Groups of a recorded step written to rollouts parquet, with their pictures."""
    rollouts_every: Positive = 1
    """Steps between recorded rollouts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    run: RunConfig
    """The run as a whole: its name, seed and files."""
    plugins: tuple[str, ...] = ()
    """Importable modules or paths (a package folder or a .py file) with your own tasks, components, readers, surrogates
    and families; loaded in every worker process."""
    model: ModelConfig
    """The policy and the segmenter."""
    data: DataConfig
    """The samples, and how they are read."""
    task: dict[str, TaskConfig]
    """How each task is put to the policy, by its name as samples carry it: segment, ground, count."""
    look: LookConfig
    """Look-to-Confirm."""
    reward: RewardConfig
    """What an answer is rewarded for."""
    algorithm: AlgorithmConfig
    """The objective (`learner/loss.py`), the advantages (`learner/advantages.py`), and how a batch becomes steps."""
    learner: LearnerConfig
    rollout: RolloutConfig
    placement: PlacementConfig
    """DeepSpeed's ranks, vLLM's engines, and the CPUs and GPUs of each actor."""
    pipeline: PipelineConfig = PipelineConfig()
    """How far rollouts may run ahead of the learner."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
