"""Typed settings: the one place of every default and of the sentence that explains it (`make docs` lists them).

`conf/` holds only what differs. Pydantic enforces the bounds at the start. A sentence explains the fields above it.
"""

from dataclasses import dataclass, field

from perception.config.fields import AnswerFrame, LookMode
from perception.config.inputs import DataConfig, ModelConfig, TaskConfig
from perception.config.learning import AlgorithmConfig, LearnerConfig, LoraConfig
from perception.config.rewards import EcdfConfig, GroupRankConfig, LookConfig, RewardConfig, Weights, weights
from perception.config.running import PipelineConfig, PlacementConfig, RolloutConfig, RunConfig, WandbConfig


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
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    """How far rollouts may run ahead of the learner."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
