"""Runtime shared by rollout, reward workers and learner: actors, placement, weight transport, the Ray cluster."""
