"""The vocabulary every room shares: types, frames, answers, matching, metrics, data sets. No torch, no ray."""
