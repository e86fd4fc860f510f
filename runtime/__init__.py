"""What needs Ray or torch and is shared by rollout, reward workers and learner."""
