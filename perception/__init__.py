"""The vocabulary every room shares: types, frames, answers, matching, metrics, data sets. No torch, no ray."""

from __future__ import annotations
