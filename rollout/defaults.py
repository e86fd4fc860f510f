"""Settings of a rollout engine that depend on whether it has its GPU to itself."""

from dataclasses import replace

from perception.config import PlacementConfig, RolloutConfig

FP8_PARITY_LIMIT = 0.2
"""Mean |log-prob difference| allowed between an fp8 engine and the learner. A random policy of 0.3 M parameters has
0.08 in fp8, 0.009 in bfloat16, and 0.7 with stale weights."""


def by_placement(config: RolloutConfig, placement: PlacementConfig) -> RolloutConfig:
    """The settings with a value for each that is left to the placement (0 or None)."""
    alone = placement.device == "cuda" and placement.engine_gpus >= 1
    return replace(
        config,
        max_num_seqs=config.max_num_seqs or (256 if alone else 64),
        max_batched_tokens=config.max_batched_tokens or (8192 if alone else 0),
        gpu_memory=config.gpu_memory or (0.9 if alone else 0.3),
        enforce_eager=not alone if config.enforce_eager is None else config.enforce_eager,
    )
