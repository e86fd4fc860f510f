"""Shared by all packages: types, settings, tasks, data sets, frames, matching, metrics, scenes. No torch, no ray."""
