"""Training: a typed recipe, its stages, the loop, metrics, validation and checkpoints."""
