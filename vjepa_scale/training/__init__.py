"""The loop: where a stage starts, one step, metrics, checkpoints in time."""
