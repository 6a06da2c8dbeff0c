"""What keeps a run alive: set-up, batches, updates, checkpoints, logs, signals."""
