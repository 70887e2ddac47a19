"""Checkpoints, the run directory, and trained models loaded from it."""
