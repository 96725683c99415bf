"""Training: one loop, one step, checkpoints, the record of a run."""
