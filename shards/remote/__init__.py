"""Packed data sets and raw files at remote addresses; `shards.remote.datasets` is the public interface."""
