"""Hydra's launcher of a sweep: every combination is a run of its own, several at once where that is asked for."""
