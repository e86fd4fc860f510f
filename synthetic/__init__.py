"""The synthetic world: scenes, questions about them, and small models trained on it from random weights."""
