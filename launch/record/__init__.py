"""What a run leaves behind: directory, metrics, rollouts, W&B, progress, summary."""
