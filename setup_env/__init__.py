"""What makes the environment, and what it needs of a machine."""
