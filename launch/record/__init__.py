"""Records of a run: directory, metrics, rollouts, W&B, progress, summary."""
