"""Checkpoints, the run directory, and trained models loaded from it: io -> checkpointer -> trained_model -> run_dir."""
