"""Training: settings, the loop, evaluation, checkpoints."""
