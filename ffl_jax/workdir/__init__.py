"""What a run leaves behind, and what is read back: checkpoints, logs, curves. Light on imports."""
