"""Process-level services of a run: progress display, metric loggers, profiler and environment stamp."""
