"""Reward workers: SAM2 draws masks of the answers, components measure them, ranks make rewards of the measures."""
