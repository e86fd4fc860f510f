"""Settings of the objective and of the learner."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from perception.config.fields import Natural, NonNegative, Positive, Rate


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
