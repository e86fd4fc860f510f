"""A run: its settings, checks, system of workers, pipeline, batches and state."""
