"""Exact resume, checkpoints, signals, shards, launching and speed on a CPU: all that rides on the Trainer."""
