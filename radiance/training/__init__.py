"""Training: optimizer, steps, run directories, checkpoints."""
