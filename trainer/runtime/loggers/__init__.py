"""Metric loggers: receivers of a run's metrics and images besides `metrics.jsonl`."""
