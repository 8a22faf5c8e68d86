"""What rides on the Trainer: exact resume, checkpoints, signals, shards, launching, speed on a CPU."""
