"""Settings of the run: engines, pipeline, placement, W&B, files."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Le

from perception.config.fields import Fraction, Natural, NonNegative, Positive, Rate


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
    pictures_every: Positive = 10
    """Steps between pictures and tables of training answers; those of an evaluation are always sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    name: str = "run"
    output: str = "runs"
    """The run's directory is `<output>/<name>/`. On a cluster: an absolute path that every node shares."""
    seed: int = 42
    """Seed of data order, sampling and everything else that is drawn."""
    resume: str | None = None
    """A run's name or directory: go on from its newest whole checkpoint, by its own settings; what is given beside goes
    on top. Learner ranks, ZeRO stage and number format may be others."""
    new_data: bool = False
    """Go on although the training samples are others; begins with the first of them."""
    resume_weights: str | None = None
    """A run's name or directory: start with the weights of its newest checkpoint and a fresh optimizer. Frozen weights,
    and the policy that a KL refers to, are those at model.path."""
    deterministic: bool = False
    """Bit-exact on the CPU: sequences are sampled one at a time, and torch uses deterministic algorithms only."""
    eval_every: Natural = 0
    """Steps between held-out evaluations; 0: only before and after."""
    stop_if: tuple[str, ...] = ()
    """Rules that end the run with a checkpoint and exit status 3, as "reward/mean < 0.1 for 20" (steps), "reward/mean
    flat for 50" or "failure/truncated > 0.9" (`launch/run/alarms.py`)."""
    checkpoint_every: Natural = 50
    """Steps between checkpoints; 0: one only where the run is stopped."""
    rollouts_kept: Natural = 16
    """Groups of a recorded step written to rollouts parquet, with their pictures."""
    rollouts_every: Positive = 1
    """Steps between recorded rollouts."""
    profile_steps: str | None = None
    """First and last of at most 10 steps, as "3:5", in which torch profiles the first engine (64 forward passes at
    most), reward worker and learner rank: `profile/ROLE.json.gz`, for ui.perfetto.dev. These steps take longer."""
    trackers: tuple[str, ...] = ("wandb",)
    """Where the run can be watched: wandb, tensorboard, or one that a plugin registers (`launch.record.trackers`)."""
