"""Decoders of single raw files: idx, CSV, npz and image files."""
