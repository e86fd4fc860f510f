"""Rollout engines: groups of sampled answers from vLLM, and new weights into it while it runs."""
