"""The synthetic world: scenes, questions about them, small models trained on them, and all of it on disk."""
