"""Small models trained from random weights on the synthetic world."""
